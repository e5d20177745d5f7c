// What follows the sums of a product while they are in cache: bias, activation, residual, store.

#pragma once

#include "activation.h"
#include "packed_linear_kernels.h"
#include "split.h"
#include "vec.h"

namespace vitslim {
namespace {

// The part of a block that lies in one vector of columns, which begins at `c`.
struct BlockColumn {
  const float* sums;
  int64_t sums_stride;
  const float* residual;
  float* y;
  Vec bias, scale;
  int64_t columns;
};

// y = residual + scale * activate(sums + bias) for the rows row..row + N.
template <Activation A, int N>
INLINE void finish_rows(const Product& p, const BlockColumn& block, int64_t row) {
  Vec out[N];
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i)
    out[i] = add(load(block.sums + (row + i) * block.sums_stride), block.bias);
  activate<A>(out);
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) {
    if (block.residual) {
      const float* residual = block.residual + (row + i) * p.residual_stride;
      out[i] = fma(out[i], block.scale, load_first(residual, block.columns));
    }
    float* y = block.y + (row + i) * p.y_stride;
    block.columns >= LANES ? store(y, out[i]) : store_first(y, out[i], block.columns);
  }
}

template <Activation A, int N>
INLINE void run_rows(const Product& p, const BlockColumn& block, int64_t row, int64_t rows) {
  if (rows == N) {
    finish_rows<A, N>(p, block, row);
  } else if constexpr (N > 1) {
    run_rows<A, N - 1>(p, block, row, rows);
  }
}

// The same for a block of [rows][vecs] vectors in memory, which begins at `row` and `column` of y.
template <Activation A>
void finish_block(const Product& p, const float* sums, int64_t rows, int64_t vecs, int64_t row,
                  int64_t column) {
  for (int64_t v = 0; v < vecs; ++v) {
    const int64_t c = column + v * LANES, columns = p.weight.out - c;
    if (columns <= 0) return;
    const BlockColumn block{sums + v * LANES,
                            vecs * LANES,
                            p.residual ? p.residual + row * p.residual_stride + c : nullptr,
                            p.y + row * p.y_stride + c,
                            p.bias ? load_first(p.bias + c, columns) : zero(),
                            p.scale ? load_first(p.scale + c, columns) : broadcast(1.0f),
                            columns};
    const Split pieces(rows, 6);
    for (int64_t i = 0; i < pieces.pieces; ++i) {
      const int64_t first = pieces.begin(i);
      run_rows<A, 6>(p, block, first, pieces.begin(i + 1) - first);
    }
  }
}

using FinishBlock = void (*)(const Product&, const float*, int64_t, int64_t, int64_t, int64_t);

inline FinishBlock finish_of(Activation activation) {
  switch (activation) {
    case Activation::GELU:
      return finish_block<Activation::GELU>;
    case Activation::GELU_TANH:
      return finish_block<Activation::GELU_TANH>;
    case Activation::QUICK_GELU:
      return finish_block<Activation::QUICK_GELU>;
    case Activation::SILU:
      return finish_block<Activation::SILU>;
    case Activation::RELU:
      return finish_block<Activation::RELU>;
    default:
      return finish_block<Activation::NONE>;
  }
}

}  // namespace
}  // namespace vitslim
