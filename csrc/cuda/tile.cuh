// Tiles of 16-bit numbers in shared memory, and what tensor cores read of them.
//
// A tile has rows of W numbers, W a multiple of 16, in chunks of 8 (16 bytes). Chunks are swizzled
// within their row so that the same chunk of 8 neighbouring rows, which ldmatrix reads at once,
// lies in 8 different groups of banks, whatever W is.
//
// A float32 operand is a sum of PARTS bfloat16 numbers, each what the ones before it leave, and so
// a tile has PARTS planes. A product then takes the pairs of parts whose size matters: 1, 3 or 6.

#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace vitslim {

// What the tensor cores multiply of numbers of type E.
template <typename E>
struct OperandOf {
  using type = E;
};
template <>
struct OperandOf<float> {
  using type = BFloat16;
};
template <typename E>
using Operand = typename OperandOf<E>::type;

// Some threads of a block that work together: this one's number, and how many they are.
struct Team {
  int index, count;
};

__device__ inline Team block_team() { return {int(threadIdx.x), int(blockDim.x)}; }
__device__ inline int lane_of_warp() { return int(threadIdx.x % 32); }
__device__ inline Team warp_team() { return {lane_of_warp(), 32}; }

// In bytes, from the start of a plane.
template <int W>
__device__ inline int tile_offset(int row, int chunk) {
  constexpr int CHUNKS = W / 8, POWER = CHUNKS & -CHUNKS, GROUP = POWER < 8 ? POWER : 8;
  return (row * CHUNKS + (chunk ^ (row * GROUP / 8 & (GROUP - 1)))) * 16;
}

template <int W, int PARTS>
struct Tile {
  unsigned char* first;  // on a multiple of 16
  int rows;

  static __device__ __host__ constexpr int bytes(int rows) { return PARTS * rows * W * 2; }
  __device__ unsigned char* at(int part, int row, int chunk) const {
    return first + part * rows * W * 2 + tile_offset<W>(row, chunk);
  }
  // The same tile from a row on, a multiple of 8.
  __device__ Tile from(int row) const { return {first + row * W * 2, rows}; }
};

// The columns of one head in some rows of a tensor in global memory.
template <typename E>
struct Rows {
  E* first;
  int64_t stride;  // in elements
  int count;       // rows that there are
  int width;       // columns that there are
  bool aligned;    // every row starts on a multiple of 16 bytes

  __device__ Rows from(int row) const {
    return {first + row * stride, stride, count - row, width, aligned};
  }
};

template <typename T>
__device__ inline void unpack(uint32_t pair, float& low, float& high) {
  low = to_float(T{uint16_t(pair)});
  high = to_float(T{uint16_t(pair >> 16)});
}

// Two neighbours as PARTS pairs of 16-bit numbers.
template <typename T, int PARTS>
__device__ inline void split(float low, float high, uint32_t (&parts)[PARTS]) {
#pragma unroll
  for (int p = 0; p < PARTS; ++p) {
    parts[p] = pack<T>(low, high);
    if (p + 1 == PARTS) break;
    float low_part, high_part;
    unpack<T>(parts[p], low_part, high_part);
    // An infinity leaves nothing; its difference would be NaN.
    low = low == low_part ? 0.0f : low - low_part;
    high = high == high_part ? 0.0f : high - high_part;
  }
}

// Begins to copy `rows` rows into a tile of one plane, 16 bytes at a time: source.aligned. Zeros
// where the source has no rows or columns.
template <int W, typename E>
__device__ inline void fill_async(const Tile<W, 1>& tile, const Rows<const E>& source, int rows,
                                  Team team) {
  static_assert(sizeof(E) == 2);
  for (int i = team.index; i < rows * (W / 8); i += team.count) {
    const int row = i / (W / 8), chunk = i % (W / 8);
    int columns = source.width - chunk * 8;
    columns = row >= source.count || columns < 0 ? 0 : columns < 8 ? columns : 8;
    const E* from = columns ? source.first + row * source.stride + chunk * 8 : source.first;
    copy_async(tile.at(0, row, chunk), from, 2 * columns);
  }
}

// Eight neighbours as float32, zeros beyond `columns` of them.
template <typename E>
__device__ inline void load_chunk(const E* from, int columns, bool aligned, float (&x)[8]) {
  if (aligned && columns >= 8) {
    constexpr int WORDS = sizeof(E) / 2;  // of 16 bytes
    union {
      uint4 words[WORDS];
      E numbers[8];
    } chunk;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) chunk.words[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = to_float(chunk.numbers[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = i < columns ? to_float(from[i]) : 0.0f;
  }
}

// Copies `rows` rows into a tile, each number times factor(column), in any alignment and dtype.
template <int W, int PARTS, typename E, typename Factor>
__device__ inline void fill_scaled(const Tile<W, PARTS>& tile, const Rows<const E>& source,
                                   int rows, Team team, Factor factor) {
  for (int i = team.index; i < rows * (W / 8); i += team.count) {
    const int row = i / (W / 8), chunk = i % (W / 8);
    const int columns = row < source.count ? source.width - chunk * 8 : 0;
    float x[8] = {};
    if (columns > 0)
      load_chunk(source.first + row * source.stride + chunk * 8, columns, source.aligned, x);
    uint32_t parts[4][PARTS];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (2 * k < columns) x[2 * k] *= factor(chunk * 8 + 2 * k);
      if (2 * k + 1 < columns) x[2 * k + 1] *= factor(chunk * 8 + 2 * k + 1);
      split<Operand<E>, PARTS>(x[2 * k], x[2 * k + 1], parts[k]);
    }
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
      *reinterpret_cast<uint4*>(tile.at(p, row, chunk)) =
          make_uint4(parts[0][p], parts[1][p], parts[2][p], parts[3][p]);
  }
}

// As it is, by the fastest way that the source allows. The caller commits and waits in either case.
template <int W, int PARTS, typename E>
__device__ inline void fill(const Tile<W, PARTS>& tile, const Rows<const E>& source, int rows,
                            Team team) {
  if constexpr (sizeof(E) == 2) {
    if (source.aligned) return fill_async(tile, source, rows, team);
  }
  fill_scaled(tile, source, rows, team, [](int) { return 1.0f; });
}

// One 16 x 16 operand of mma, in each of its parts.
template <int PARTS>
using Fragment = uint32_t[PARTS][4];

// The fragments of the 16 x 16 numbers X from `row` and `column` on, both multiples of 16, as
//   load_a             the left operand X
//   load_b             the right operand X^T
//   load_b_transposed  the right operand X
template <int W, int PARTS>
__device__ inline void load_a(Fragment<PARTS>& fragment, const Tile<W, PARTS>& tile, int row,
                              int column) {
  const int lane = lane_of_warp();
#pragma unroll
  for (int p = 0; p < PARTS; ++p)
    ldmatrix(fragment[p], tile.from(row).at(p, lane % 16, column / 8 + lane / 16));
}
template <int W, int PARTS>
__device__ inline void load_b_transposed(Fragment<PARTS>& fragment, const Tile<W, PARTS>& tile,
                                         int row, int column) {
  const int lane = lane_of_warp();
#pragma unroll
  for (int p = 0; p < PARTS; ++p)
    ldmatrix_transposed(fragment[p], tile.from(row).at(p, lane % 16, column / 8 + lane / 16));
}
template <int W, int PARTS>
__device__ inline void load_b(Fragment<PARTS>& fragment, const Tile<W, PARTS>& tile, int row,
                              int column) {
  const int lane = lane_of_warp();
#pragma unroll
  for (int p = 0; p < PARTS; ++p)
    ldmatrix(fragment[p],
             tile.from(row).at(p, lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2));
}
// A 16 x N result: accumulators [N / 8][4]. A lane holds of every 8 columns the numbers
//   [0], [1]   row lane / 4,      columns 2 (lane % 4) and the next
//   [2], [3]   row lane / 4 + 8,  the same columns
__device__ inline int lane_row() { return lane_of_warp() / 4; }
__device__ inline int lane_column() { return lane_of_warp() % 4 * 2; }

// left, right += a b by every pair of parts that matters, the smallest first.
template <typename T, int PARTS>
__device__ inline void multiply_parts(float (&left)[4], float (&right)[4], const Fragment<PARTS>& a,
                                      const Fragment<PARTS>& b) {
#pragma unroll
  for (int order = PARTS - 1; order >= 0; --order)
#pragma unroll
    for (int i = order; i >= 0; --i) {
      mma<T>(left, a[i], b[order - i][0], b[order - i][1]);
      mma<T>(right, a[i], b[order - i][2], b[order - i][3]);
    }
}

// left, right += a b: the 16 columns of the product in two halves.
//
// Tensor cores cut off what an addition would round, always to the same side. So a product in three
// parts, which is to be exact, is added up on its own and then rounded once.
template <typename T, int PARTS>
__device__ inline void multiply(float (&left)[4], float (&right)[4], const Fragment<PARTS>& a,
                                const Fragment<PARTS>& b) {
  if constexpr (PARTS < 3) {
    multiply_parts<T, PARTS>(left, right, a, b);
  } else {
    float product[2][4] = {};
    multiply_parts<T, PARTS>(product[0], product[1], a, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      left[i] += product[0][i];
      right[i] += product[1][i];
    }
  }
}

// The left operand that is the 16 x 16 result of `left` and `right`.
template <typename T, int PARTS>
__device__ inline void operand_of(Fragment<PARTS>& fragment, const float (&left)[4],
                                  const float (&right)[4]) {
  uint32_t parts[4][PARTS];
  split<T, PARTS>(left[0], left[1], parts[0]);
  split<T, PARTS>(left[2], left[3], parts[1]);
  split<T, PARTS>(right[0], right[1], parts[2]);
  split<T, PARTS>(right[2], right[3], parts[3]);
#pragma unroll
  for (int p = 0; p < PARTS; ++p)
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[p][i] = parts[i][p];
}

// Stores a warp's 16 x W result as the rows of `target`. `staging` has room for 16 x W 16-bit
// numbers of this warp: through it 16 bytes go out at a time. float32 needs none, four lanes fill a
// sector of memory.
template <int W, typename E>
__device__ inline void store_rows(const Rows<E>& target, const float (&result)[W / 8][4],
                                  unsigned char* staging) {
  // Once for many products: its addresses are not worth registers in between.
  const int lane = anew(lane_of_warp()), lane_row = lane / 4, lane_column = lane % 4 * 2;
  if constexpr (sizeof(E) == 4) {
#pragma unroll
    for (int n = 0; n < W / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = lane_row + i / 2 * 8, column = n * 8 + lane_column + i % 2;
        if (row < target.count && column < target.width)
          target.first[row * target.stride + column] = result[n][i];
      }
  } else {
    const Tile<W, 1> tile{staging, 16};
    __syncwarp();
#pragma unroll
    for (int n = 0; n < W / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(tile.from(half * 8).at(0, lane_row, n) + 2 * lane_column) =
            pack<E>(result[n][2 * half], result[n][2 * half + 1]);
    __syncwarp();
    for (int i = lane; i < 16 * (W / 8); i += 32) {
      const int row = i / (W / 8), chunk = i % (W / 8), columns = target.width - chunk * 8;
      if (row >= target.count || columns <= 0) continue;
      E* to = target.first + row * target.stride + chunk * 8;
      const E* from = reinterpret_cast<const E*>(tile.at(0, row, chunk));
      if (target.aligned && columns >= 8) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int k = 0; k < 8 && k < columns; ++k) to[k] = from[k];
      }
    }
    __syncwarp();
  }
}

// The sum, or the largest, over the four lanes that hold a row of a result.
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace vitslim
