// A linear layer whose weight was packed once, with all that surrounds it in a transformer block.
//
//   y = f(norm(x) W^T + b)                    or, added to a residual r,
//   y = r + s * f(norm(x) W^T + b)
//
// A weight [out, in] is packed into panels of PANEL output columns, zero beyond `out`:
//   float32    [ceil(out / 16)][in][16]
//   bfloat16   [ceil(out / 16)][ceil(in / 2)][16][2], neighbours of the sum side by side, zero
//   beyond
//              `in`, as instructions that multiply pairs want them
// The order does not depend on the instruction set, so what was packed on one machine runs on every
// other. Plain C++: no torch here.

#pragma once

#include <cstdint>

#include "activation.h"
#include "dtype.h"
#include "threads.h"

namespace vitslim {

constexpr int64_t PANEL = 16;

struct PackedWeight {
  const void* panels;
  DType dtype;  // FLOAT32 or BFLOAT16
  // Products of bfloat16 pairs summed in float32, with the left operand rounded to bfloat16; false:
  // all arithmetic is float32. Needs BFLOAT16 panels.
  bool bfloat16_products;
  int64_t in, out;
};

struct LayerNorm {
  const float* weight;  // [in]
  const float* bias;    // [in]
  float eps;
};

struct PackedLinear {
  const float* x;         // [rows, in], rows x_stride apart
  const LayerNorm* norm;  // of each row of x, or null
  PackedWeight weight;
  const float* bias;  // [out], or null
  Activation activation;
  const float* residual;  // [rows, out], rows residual_stride apart, or null; may be y
  const float* scale;     // [out], with a residual only, or null for ones
  float* y;               // [rows, out], rows y_stride apart
  int64_t rows, x_stride, residual_stride, y_stride;  // strides in elements
};

void packed_linear_cpu(const PackedLinear& call, const Threads& threads);

// How many elements the panels of a weight take.
int64_t panel_elements(int64_t in, int64_t out, DType dtype);

}  // namespace vitslim
