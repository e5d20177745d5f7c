// What the kernels of gated_layer_norm share: the rows they work on.

#pragma once

#include <cstdint>

#include "rows.cuh"

namespace vitslim {

// Images of tokens whose channels lie side by side.
template <typename E>
struct Images {
  const E* first;  // [batch, tokens, channels]
  int64_t batch_stride, token_stride;
};

template <typename E, typename W>
struct GatedNorm {
  int rows;  // batch * tokens
  int tokens, channels;
  Images<E> x;
  const W* weight;    // [channels]
  const W* bias;      // [channels]
  const float* gate;  // [tokens], or null for ones

  __device__ int token(int row) const { return row % tokens; }
  __device__ const E* row_of(const Images<E>& images, int row) const {
    return images.first + row / tokens * images.batch_stride + token(row) * images.token_stride;
  }
  __device__ float gate_of(int row) const { return gate ? gate[token(row)] : 1.0f; }
};

// What backward reads beside x, and what it writes.
template <typename E>
struct GatedNormGradients {
  Images<E> grad_out;
  const float* mean;   // [rows]
  const float* rstd;   // [rows]
  E* grad_x;           // [rows, channels]
  float* grad_affine;  // [blocks of rows, 2 * channels]
  float* grad_gate;    // [rows], or null without a gate
};

// The square root's reciprocal, infinity for 0.
__device__ inline float reciprocal_root(float x) { return reciprocal_fast(sqrtf(x)); }

}  // namespace vitslim
