// Register tiles: the products of the CPU kernels.
//
// A tile is R rows of V vectors, all of it in registers. For each step of the sum it takes R single
// numbers of the left operand, broadcast, and V vectors of the right one. The lanes are always
// full: a ragged size is the number of rows or of steps, never the lanes.

#pragma once

#include "split.h"
#include "vec.h"

namespace vitslim {
namespace {

// Rows that fit beside V vectors: R * V sums, V vectors and one broadcast number, measured best
// where some registers stay free.
template <int V>
constexpr int MAX_ROWS = REGISTERS == 32 ? (V == 4   ? 6
                                            : V == 3 ? 8
                                            : V == 2 ? 12
                                                     : 14)
                                         : (V == 3   ? 4
                                            : V == 2 ? 6
                                                     : 8);
constexpr int MAX_VECS = REGISTERS == 32 ? 4 : 2;

template <int R, int V>
INLINE void clear_tile(Vec (&sums)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = zero();
}

// sums += what stands at p. A long sum comes in parts, each begun at zero and added here, because
// the rounding error grows with the number of steps in a chain.
template <int R, int V>
INLINE void add_tile(const float* p, int64_t stride, Vec (&sums)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = add(sums[r][v], load(p + r * stride + v * LANES));
}

template <int R, int V>
INLINE void store_tile(float* p, int64_t stride, const Vec (&sums)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(p + r * stride + v * LANES, sums[r][v]);
}

// A step of a sum of float32 products.
struct MultiplyAdd {
  static INLINE Vec run(Vec left, Vec right, Vec sum) { return fma(left, right, sum); }
};

// sums[r][v] += sum over k of left(r, k) * right(k, v), as Step multiplies and adds, where left(r,
// k) stands at left[r * row_step + k * depth_step] and the vector right(k, v) at right[k *
// right_stride + v * vec_step]. FETCH: each step also asks for a cache line from `fetch` on, which
// is needed soon; left alone, the hardware begins to fetch it at the first miss.
template <typename Step = MultiplyAdd, bool FETCH = false, int R, int V>
INLINE void multiply(const float* left, int64_t row_step, int64_t depth_step, const float* right,
                     int64_t right_stride, int64_t vec_step, int64_t depth, Vec (&sums)[R][V],
                     const char* fetch = nullptr) {
  for (int64_t k = 0; k < depth; ++k) {
    if constexpr (FETCH) __builtin_prefetch(fetch + k * 64, 0, 3);
    Vec vecs[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) vecs[v] = load(right + v * vec_step);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec number = broadcast(left[r * row_step]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = Step::run(number, vecs[v], sums[r][v]);
    }
    left += depth_step;
    right += right_stride;
  }
}

// left[R][depth], rows `stride` apart: the sum runs along the rows.
template <int R, int V>
INLINE void multiply_rows(const float* left, int64_t stride, const float* right,
                          int64_t right_stride, int64_t depth, Vec (&sums)[R][V]) {
  multiply(left, stride, 1, right, right_stride, LANES, depth, sums);
}

// left[depth][R], rows `stride` apart: the sum runs down the columns.
template <int R, int V>
INLINE void multiply_columns(const float* left, int64_t stride, const float* right,
                             int64_t right_stride, int64_t depth, Vec (&sums)[R][V]) {
  multiply(left, 1, stride, right, right_stride, LANES, depth, sums);
}

template <int V, int R, typename Product>
INLINE void run_tile(const Product& product, int64_t row, int64_t rows) {
  if (rows == R) {
    product.template run<R, V>(row);
  } else if constexpr (R > 1) {
    run_tile<V, R - 1>(product, row, rows);
  }
}

// Calls product.run<R, V>(first row) for tiles that cover `rows` rows.
template <int V, typename Product>
INLINE void run_tiles(const Product& product, int64_t rows) {
  const Split tiles(rows, MAX_ROWS<V>);
  for (int64_t i = 0; i < tiles.pieces; ++i) {
    const int64_t row = tiles.begin(i);
    run_tile<V, MAX_ROWS<V>>(product, row, tiles.begin(i + 1) - row);
  }
}

}  // namespace
}  // namespace vitslim
