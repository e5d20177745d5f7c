// The products of the attention's backward, and the sums of 16 keys that both kernels share.
//
// A warp owns 16 keys and sees 16 queries at a time, as S^T and dP^T [keys, queries]: the results
// of two products turn into the left operands of two others within the warp's registers.

#pragma once

#include "ragged_attention_backward.cuh"

namespace vitslim {

// The place in a tile `columns` columns, a multiple of 8, further on than that of tile_offset.
template <int W>
__device__ inline int further(int offset, int columns) {
  constexpr int CHUNKS = W / 8, POWER = CHUNKS & -CHUNKS, GROUP = POWER < 8 ? POWER : 8;
  const int chunks = columns / 8;
  return (offset ^ (chunks & (GROUP - 1)) * 16) + (chunks & ~(GROUP - 1)) * 16;
}

// load_a, load_b and their like, from 16 rows of tiles. Where a lane reads differs from
// column to column by a constant, and so two registers are enough for all of them.
template <int W>
struct Lane {
  int by_rows, by_columns;

  static __device__ __forceinline__ Lane of_thread() {
    const int lane = lane_of_warp();
    return {tile_offset<W>(lane % 16, lane / 16),
            tile_offset<W>(lane % 8 + lane / 16 * 8, lane / 8 % 2)};
  }
  template <int PARTS>
  __device__ __forceinline__ void load_a(Fragment<PARTS>& fragment, const Tile<W, PARTS>& tile,
                                         int row, int column) const {
#pragma unroll
    for (int p = 0; p < PARTS; ++p) ldmatrix(fragment[p], at(tile, p, by_rows, row, column));
  }
  template <int PARTS>
  __device__ __forceinline__ void load_b(Fragment<PARTS>& fragment, const Tile<W, PARTS>& tile,
                                         int row, int column) const {
#pragma unroll
    for (int p = 0; p < PARTS; ++p) ldmatrix(fragment[p], at(tile, p, by_columns, row, column));
  }
  template <int PARTS>
  __device__ __forceinline__ void load_a_transposed(Fragment<PARTS>& fragment,
                                                    const Tile<W, PARTS>& tile, int row,
                                                    int column) const {
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
      ldmatrix_transposed(fragment[p], at(tile, p, by_columns, row, column));
  }
  template <int PARTS>
  __device__ __forceinline__ void load_b_transposed(Fragment<PARTS>& fragment,
                                                    const Tile<W, PARTS>& tile, int row,
                                                    int column) const {
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
      ldmatrix_transposed(fragment[p], at(tile, p, by_rows, row, column));
  }

 private:
  template <int PARTS>
  static __device__ __forceinline__ const void* at(const Tile<W, PARTS>& tile, int part, int offset,
                                                   int row, int column) {
    return tile.first + part * tile.rows * W * 2 + further<W>(row * W * 2 + offset, column);
  }
};

// The left operand of 16 rows of a tile. HELD of its W / 16 fragments, the first, stay in
// registers; of the others the tile is asked each time, or `stash`, the one that is left when the
// tile is gone.
template <int W, int PARTS, int HELD, bool STASHED = false>
struct Stripe {
  Tile<W, PARTS> tile;
  uint4* stash;  // of this lane
  Fragment<PARTS> held[HELD ? HELD : 1];

  __device__ __forceinline__ void load(const Lane<W>& lane) {
#pragma unroll
    for (int k = 0; k < HELD; ++k) lane.load_a(held[k], tile, 0, 16 * k);
    if constexpr (STASHED) {
      static_assert(PARTS == 1 && HELD == W / 16 - 1);
      Fragment<1> last;
      lane.load_a(last, tile, 0, W - 16);
      *stash = make_uint4(last[0][0], last[0][1], last[0][2], last[0][3]);
    }
  }
  __device__ __forceinline__ void load_other(Fragment<PARTS>& fragment, int column,
                                             const Lane<W>& lane) const {
    if constexpr (STASHED) {
      const uint4 words = *stash;
      fragment[0][0] = words.x, fragment[0][1] = words.y;
      fragment[0][2] = words.z, fragment[0][3] = words.w;
    } else {
      lane.load_a(fragment, tile, 0, column);
    }
  }
};

// result = the stripe times the transpose of 16 rows of b.
template <typename T, int W, int PARTS, int HELD, bool STASHED>
__device__ __forceinline__ void multiply_transposed(float (&result)[2][4],
                                                    const Stripe<W, PARTS, HELD, STASHED>& stripe,
                                                    const Tile<W, PARTS>& b, int row,
                                                    const Lane<W>& lane) {
#pragma unroll
  for (int i = 0; i < 8; ++i) result[i / 4][i % 4] = 0.0f;
// Parts make a round long enough, and registers scarce.
#pragma unroll(PARTS > 1 ? 1 : W / 16)
  for (int k = 0; k < W / 16; ++k) {
    Fragment<PARTS> right;
    lane.load_b(right, b, row, 16 * k);
    if (k < HELD) {
      multiply<T, PARTS>(result[0], result[1], stripe.held[k < HELD ? k : 0], right);
    } else {
      Fragment<PARTS> left;
      stripe.load_other(left, 16 * k, lane);
      multiply<T, PARTS>(result[0], result[1], left, right);
    }
  }
}

// result += a times 16 rows of b.
template <typename T, int W, int PARTS>
__device__ __forceinline__ void multiply_add(float (&result)[W / 8][4], const Fragment<PARTS>& a,
                                             const Tile<W, PARTS>& b, int row,
                                             const Lane<W>& lane) {
#pragma unroll
  for (int n = 0; n < W / 16; ++n) {
    Fragment<PARTS> right;
    lane.load_b_transposed(right, b, row, 16 * n);
    multiply<T, PARTS>(result[2 * n], result[2 * n + 1], a, right);
  }
}

// Queries as the warps of keys see them.
template <int W, int PARTS>
struct Queries {
  Tile<W, PARTS> raw, scaled, grad_out;  // scaled = round(q z^2)
};

// The same number in all lanes, and the compiler sees it: what follows from it takes registers of
// the warp, of which there are more than enough.
__device__ inline int warp_of_block() { return __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0); }

// For the fills within a loop: their addresses are worth less than the registers.
__device__ inline Team block_team_here() { return {anew(int(threadIdx.x)), int(blockDim.x)}; }

// Blocks of queries on their way through shared memory. 16-bit numbers arrive in the background,
// one block ahead; float32 has to be split on its way, by the threads, and takes half the rows.
template <typename E, int W, int PARTS>
struct QueryStream {
  static constexpr int ROWS = sizeof(E) == 4 ? 16 : 32, STAGES = sizeof(E) == 4 ? 1 : 2;
  const BackwardHead<E>& head;
  const float* z;
  Tile<W, PARTS> raw, scaled, grad_out;  // STAGES * ROWS rows; `scaled` only with a mask

  __device__ QueryStream(const BackwardHead<E>& head, const float* z, SharedArrays& arrays)
      : head(head), z(z) {
    raw = arrays.tile<W, PARTS>(STAGES * ROWS);
    grad_out = arrays.tile<W, PARTS>(STAGES * ROWS);
    scaled = arrays.tile<W, PARTS>(STAGES * ROWS);
    if (!head.call.mask) scaled = raw;
  }
  __device__ float factor(int column) const { return z[column] * z[column]; }

  // A block from `query` on, a multiple of ROWS.
  __device__ __forceinline__ void begin(int query) const {
    const int row = query % (STAGES * ROWS);
    const Team team = block_team_here();
    const Rows<const E> q = head.part(0, query);
    fill(raw.from(row), q, ROWS, team);
    fill(grad_out.from(row), head.grad_out(query), ROWS, team);
    if constexpr (sizeof(E) == 4) {
      if (head.call.mask)
        fill_scaled(scaled.from(row), q, ROWS, team, [this](int c) { return factor(c); });
    }
    copy_async_commit();
  }
  // What this thread has to do before the barrier behind which the block is there for all.
  __device__ __forceinline__ void arrive(int query) const {
    const int row = query % (STAGES * ROWS);
    const Team team = block_team_here();
    copy_async_wait<0>();
    if constexpr (sizeof(E) == 2) {
      if (head.call.mask)
        scale_tile<E>(scaled.from(row), raw.from(row), ROWS, team,
                      [this](int c) { return factor(c); });
    }
  }
  __device__ __forceinline__ Queries<W, PARTS> queries() const { return {raw, scaled, grad_out}; }
};

// R_v and R_k of 16 keys, or one of them, and what 16 queries add to them.
template <int W, bool VALUES = true, bool KEYS = true>
struct KeySums {
  float values[VALUES ? W / 8 : 1][4] = {}, keys[KEYS ? W / 8 : 1][4] = {};

  // Of the stripes' 16 keys, `count` exist. The queries begin at `row` of their tiles and at
  // `rows`. Leaves dS^T of these queries in `scores`.
  template <typename T, int PARTS, typename KeyStripe, typename ValueStripe>
  __device__ __forceinline__ void add(const KeyStripe& key_stripe, const ValueStripe& value_stripe,
                                      int count, const Queries<W, PARTS>& queries, int row,
                                      const QueryRow* rows, const Lane<W>& lane, float exponent,
                                      Fragment<PARTS>& scores) {
    float weights[2][4], grads[2][4];
    multiply_transposed<T>(weights, key_stripe, queries.scaled, row, lane);
    if constexpr (KEYS) multiply_transposed<T>(grads, value_stripe, queries.grad_out, row, lane);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const QueryRow query = rows[i / 4 * 8 + lane_column() + i % 2];
      float& weight = weights[i / 4][i % 4];
      // Keys that do not exist have S = 0, and exp(0 - lse) may be anything.
      weight =
          lane_row() + i % 4 / 2 * 8 < count ? exp2_fast(fmaf(weight, exponent, -query.lse)) : 0.0f;
      if constexpr (KEYS) grads[i / 4][i % 4] = weight * (grads[i / 4][i % 4] - query.delta);
    }
    if constexpr (VALUES) {
      operand_of<T, PARTS>(scores, weights[0], weights[1]);
      multiply_add<T, W>(values, scores, queries.grad_out, row, lane);
    }
    if constexpr (KEYS) {
      operand_of<T, PARTS>(scores, grads[0], grads[1]);
      multiply_add<T, W>(keys, scores, queries.raw, row, lane);
    }
  }
};

// Adds two neighbours to `sum`.
template <typename T>
__device__ inline void add_pair(float (&sum)[2], const unsigned char* pair) {
  float low, high;
  unpack<T>(*reinterpret_cast<const uint32_t*>(pair), low, high);
  sum[0] += low;
  sum[1] += high;
}

// Stores what a warp has of grad_k and grad_v, of 16 keys from `first` on. With a mask the warp
// leaves in `sums` [W] what they add to grad_z. `k` holds the raw rows of K; `v` takes those of V,
// which come again from global memory, and both then take results: no other warp may need them any
// more.
template <typename E, int W, int PARTS, bool VALUES, bool KEYS>
__device__ __forceinline__ void store_keys(const BackwardHead<E>& head, int first,
                                           KeySums<W, VALUES, KEYS>& sum, const Tile<W, PARTS>& k,
                                           const Tile<W, PARTS>& v, const float* z, float scale,
                                           float* sums) {
  const bool masked = head.call.mask;
  // lane_row() and lane_column(), but not kept from the start of the kernel.
  const int lane = anew(lane_of_warp()), own_row = lane / 4, own_column = lane % 4 * 2;
  if (VALUES && masked) {
    fill(v, head.part(2, first), 16, warp_team());
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();
  }
#pragma unroll
  for (int n = 0; n < W / 8; ++n) {
    float (&key)[4] = sum.keys[KEYS ? n : 0], (&value)[4] = sum.values[VALUES ? n : 0];
    const float factors[2] = {z[n * 8 + own_column], z[n * 8 + own_column + 1]};
#pragma unroll
    for (int i = 0; KEYS && i < 4; ++i) key[i] *= scale;
    if (masked) {
      float column[2] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = own_row + half * 8;
        float raw_k[2] = {}, raw_v[2] = {};
#pragma unroll
        for (int p = PARTS - 1; p >= 0; --p) {
          if constexpr (KEYS) add_pair<Operand<E>>(raw_k, k.at(p, row, n) + 2 * own_column);
          if constexpr (VALUES) add_pair<Operand<E>>(raw_v, v.at(p, row, n) + 2 * own_column);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float each = 0.0f;
          if constexpr (VALUES) each += value[2 * half + i] * raw_v[i];
          if constexpr (KEYS) each += 2.0f * factors[i] * key[2 * half + i] * raw_k[i];
          column[i] += first + row < head.call.tokens ? each : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2)
          column[i] += __shfl_xor_sync(0xffffffffu, column[i], lanes);
        if (own_row == 0) sums[n * 8 + own_column + i] = column[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (KEYS) key[i] *= factors[i % 2] * factors[i % 2];
      if constexpr (VALUES) value[i] *= factors[i % 2];
    }
  }
  if constexpr (KEYS) store_rows<W>(head.grad_part(1, first), sum.keys, k.first);
  if constexpr (VALUES) store_rows<W>(head.grad_part(2, first), sum.values, v.first);
}

// Row `row` of grad_mask = the sums [warps][W] in the order of the warps, or += if `again`.
template <int W, typename E>
__device__ inline void add_mask_sums(const BackwardHead<E>& head, const float* sums, int warps,
                                     int64_t row, bool again) {
  __syncthreads();
  if (!head.call.mask) return;
  float* grad_mask = head.grad_mask(row);
  for (int c = threadIdx.x; c < head.width(); c += blockDim.x) {
    float total = again ? grad_mask[c] : 0.0f;
    for (int warp = 0; warp < warps; ++warp) total += sums[warp * W + c];
    grad_mask[c] = total;
  }
}

}  // namespace vitslim
