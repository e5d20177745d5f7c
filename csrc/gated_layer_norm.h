// Layer norm whose rows are scaled by a gate per token.
//
//   n = (x - mean) rstd        y = n w + b        out = y gate[token]
//
// Plain C++: no torch here.

#pragma once

#include <cstdint>

#include "dtype.h"
#include "gpu.h"

namespace vitslim {

struct GatedLayerNormShape {
  int64_t batch, tokens, channels;
  DType dtype;                             // of x, out and their gradients
  DType weight_dtype;                      // of weight and bias: dtype, or FLOAT32
  int64_t x_batch_stride, x_token_stride;  // in elements; channels lie side by side
};

struct GatedLayerNormForward {
  GatedLayerNormShape shape;
  const void* x;       // [batch, tokens, channels]
  const void* weight;  // [channels]
  const void* bias;    // [channels]
  float eps;
  const float* gate;  // [tokens], or null for ones
  void* out;          // [batch, tokens, channels], contiguous
  float* mean;        // [batch, tokens]
  float* rstd;        // [batch, tokens]
};

// With G the gradient of out and E = G gate:
//   grad_x = rstd (E w - average(E w) - n average(E w n))
//   grad_w = sum of E n        grad_b = sum of E        grad_gate = sum of G y
struct GatedLayerNormBackward {
  GatedLayerNormShape shape;
  const void* grad_out;  // [batch, tokens, channels]
  int64_t grad_out_batch_stride, grad_out_token_stride;
  const void* x;       // [batch, tokens, channels]
  const void* weight;  // [channels]
  const void* bias;    // [channels]
  const float* gate;   // [tokens], or null for ones
  const float* mean;   // [batch, tokens]
  const float* rstd;   // [batch, tokens]
  void* grad_x;        // [batch, tokens, channels], contiguous
  // [rows, 2 * channels]: parts of the gradients of weight and, behind them, of bias, for the
  // caller to add up in order.
  float* grad_affine;
  float* grad_gate;  // [batch, tokens], for the caller to add up over the images; null if gate is
};

void gated_layer_norm_forward_cuda(const GatedLayerNormForward& call, const Gpu& gpu);
void gated_layer_norm_backward_cuda(const GatedLayerNormBackward& call, const Gpu& gpu);
// How many rows the latter writes of grad_affine.
int64_t gated_layer_norm_grad_affine_rows_cuda(const GatedLayerNormShape& shape, const Gpu& gpu);

}  // namespace vitslim
