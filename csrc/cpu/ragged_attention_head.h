// What forward and backward both do with one head: sizes, factors and how an operand is summed into
// a panel. Included by ragged_attention_forward.h and ragged_attention_backward.h.

#pragma once

#include "panel.h"
#include "tile.h"

namespace vitslim {
namespace {

// One head's place in the packed projection.
struct Head {
  int64_t tokens, begin, width, columns, embed_dim;
  // The kernels raise 2 to raw * exponent where raw is the product of queries and keys as they are
  // (times the squared mask): so the logits are rounded once, as in eager PyTorch.
  float exponent;
  // Softmax needs the largest logit, hence the largest raw product: a negative scale gives its sign
  // to the queries and keys.
  float sign;

  Head(const RaggedAttentionShape& shape, int64_t head)
      : tokens(shape.tokens),
        begin(shape.head_offsets[head]),
        width(shape.head_offsets[head + 1] - begin),
        columns(round_up(width, LANES)),
        embed_dim(shape.head_offsets[shape.heads]),
        exponent(__builtin_fabsf(shape.scale) * 1.44269504088896341f),
        sign(shape.scale < 0 ? -1.0f : 1.0f) {}
};

// factors[c] = number * mask[c]^power, for c beyond the width `number`.
inline void fill_factors(const Head& head, const float* mask, int power, float number,
                         float* factors) {
  for (int64_t c = 0; c < head.columns; ++c) {
    const float z = mask && c < head.width ? mask[head.begin + c] : 1.0f;
    factors[c] = number * (power == 2 ? z * z : z);
  }
}

// sums [width][V * LANES] (+)= left^T right, where left is a row panel [depth][width] and right is
// [depth][V * LANES].
struct ColumnSums {
  const float* left;
  int64_t left_stride;
  const float* right;
  int64_t depth;
  bool start;  // sums hold nothing yet
  float* sums;

  template <int R, int V>
  INLINE void run(int64_t column) const {
    Vec tile[R][V];
    clear_tile(tile);
    multiply_columns(left + column, left_stride, right, V * LANES, depth, tile);
    float* target = sums + column * V * LANES;
    if (!start) add_tile(target, V * LANES, tile);
    store_tile(target, V * LANES, tile);
  }
};

}  // namespace
}  // namespace vitslim
