// Rows of numbers in global memory, shared among lanes, 16 bytes a lane at a time.
//
// Where all rows start on 16 bytes and end there, lane l holds the numbers l S to l S + S - 1 of a
// row, S of them in 16 bytes, then those `lanes` S further on, and so forth. Otherwise it holds
// number l and every `lanes`-th one after it, so that what a warp reads or writes at a time still
// lies side by side.

#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace vitslim {

// How many numbers fill 16 bytes.
template <typename E>
constexpr int VECTOR = 16 / int(sizeof(E));

// SIZE numbers as they lie in memory: of 16 bits they take half the registers of their values.
template <typename E, int SIZE>
union Numbers {
  static constexpr int WORDS = SIZE * int(sizeof(E)) / 16;
  uint4 words[WORDS];
  E numbers[SIZE];

  // For values to be computed once more from these.
  __device__ void make_opaque() {
#pragma unroll
    for (uint4& word : words)
      word = make_uint4(anew(word.x), anew(word.y), anew(word.z), anew(word.w));
  }
};

// The columns of one lane in a row of `count`, in vectors of SIZE.
template <int SIZE, bool ALIGNED>
class LaneColumns {
 public:
  // Aligned rows end with a vector.
  __device__ LaneColumns(int lane, int lanes, int count)
      : lane_(lane),
        lanes_(lanes),
        own_(((ALIGNED ? count / SIZE : count) - lane + lanes - 1) / lanes) {}

  __device__ int at(int vector, int i) const {
    return ALIGNED ? (vector * lanes_ + lane_) * SIZE + i : (vector * SIZE + i) * lanes_ + lane_;
  }
  __device__ bool has(int vector, int i) const {
    return (ALIGNED ? vector : vector * SIZE + i) < own_;
  }

  // Zeros beyond the row's end, and everywhere where there is no such row.
  template <typename E>
  __device__ void load(Numbers<E, SIZE>& to, const E* row, int vector, bool exists = true) const {
    if constexpr (ALIGNED) {
      const uint4* from = reinterpret_cast<const uint4*>(row + at(vector, 0));
      const bool inside = exists && has(vector, 0);
#pragma unroll
      for (int i = 0; i < to.WORDS; ++i) to.words[i] = inside ? from[i] : make_uint4(0, 0, 0, 0);
    } else {
      const LaneColumns fresh = renewed();
#pragma unroll
      for (int i = 0; i < SIZE; ++i)
        to.numbers[i] = exists && fresh.has(vector, i) ? row[fresh.at(vector, i)] : E{};
    }
  }

  template <typename E>
  __device__ void store(E* row, int vector, const float (&values)[SIZE]) const {
    if constexpr (ALIGNED) {
      if (!has(vector, 0)) return;
      Numbers<E, SIZE> numbers;
#pragma unroll
      for (int i = 0; i < SIZE; ++i) numbers.numbers[i] = from_float<E>(values[i]);
      uint4* to = reinterpret_cast<uint4*>(row + at(vector, 0));
#pragma unroll
      for (int i = 0; i < numbers.WORDS; ++i) to[i] = numbers.words[i];
    } else {
      const LaneColumns fresh = renewed();
#pragma unroll
      for (int i = 0; i < SIZE; ++i)
        if (fresh.has(vector, i)) row[fresh.at(vector, i)] = from_float<E>(values[i]);
    }
  }

 private:
  // Every number has an offset of its own here; kept, they would fill the registers.
  __device__ LaneColumns renewed() const {
    LaneColumns fresh = *this;
    fresh.lanes_ = anew(lanes_);
    return fresh;
  }

  int lane_, lanes_;
  int own_;  // vectors, or numbers, of this lane
};

inline bool aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Each sum over the lanes of a row, which all of them receive, with the same bits. `lanes` is a
// power of two from 8 on, the same in the whole block. From 64 on, all threads of the block come
// here together, and `exchange` has room for COUNT floats a warp, which nobody writes until another
// __syncthreads.
template <int COUNT>
__device__ inline void sum_over_lanes(float (&sums)[COUNT], int lanes, float* exchange) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    if (distance >= lanes) break;
#pragma unroll
    for (int k = 0; k < COUNT; ++k) sums[k] += __shfl_xor_sync(0xffffffffu, sums[k], distance);
  }
  if (lanes <= 32) return;
  const int warp = int(threadIdx.x) / 32, warps = lanes / 32, first = warp / warps * warps;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k) exchange[warp * COUNT + k] = sums[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < COUNT; ++k) sums[k] = 0;
  for (int i = first; i < first + warps; ++i)
#pragma unroll
    for (int k = 0; k < COUNT; ++k) sums[k] += exchange[i * COUNT + k];
}

// Where a column's sum lies in shared memory: lanes that hold 4 or 8 columns each, and lanes side
// by side, all meet 32 different banks.
__device__ __host__ inline int spread(int column) { return column + column / 32; }

// Adds up in order what the `groups` of a block's threads have laid into shared memory, each
// spread(count) floats, and writes the sums to `to` [count].
__device__ inline void sum_over_groups(const float* shared, int groups, int count, float* to) {
  for (int column = int(threadIdx.x); column < count; column += int(blockDim.x)) {
    float sum = 0;
    for (int g = 0; g < groups; ++g) sum += shared[g * spread(count) + spread(column)];
    to[column] = sum;
  }
}

}  // namespace vitslim
