// What each target's unit offers to packed_linear.cpp and vit_encoder.cpp, which share out the
// work.

#pragma once

#include "../packed_linear.h"

namespace vitslim {

// Panels that are read next, to be fetched into the cache meanwhile.
struct Upcoming {
  const char* first;  // null where nothing is known
  int64_t step;       // bytes from one panel to the next
  int64_t panels;
};

namespace {

// The panels of a weight from the number `panel` on, each from the element `depth` of the sum on.
inline Upcoming upcoming(const PackedWeight& weight, int64_t panel, int64_t panels, int64_t depth) {
  const bool wide = weight.dtype == DType::FLOAT32;
  const int64_t bytes = wide ? 4 : 2;
  const int64_t step = (wide ? weight.in : (weight.in + 1) / 2 * 2) * PANEL;
  return {static_cast<const char*>(weight.panels) + (panel * step + depth * PANEL) * bytes,
          step * bytes, panels};
}

}  // namespace

// Some rows times some panels of a packed weight, by one thread.
struct Product {
  const float* x;  // [rows, depth], rows x_stride apart
  int64_t rows, x_stride;
  PackedWeight weight;
  // The columns panel_begin * 16 .. panel_end * 16 of y, as far as weight.out goes.
  int64_t panel_begin, panel_end;
  // The part of the sum that x holds. bfloat16 panels: begins at an even number and ends at one, or
  // with the sum, so that it is whole pairs.
  int64_t depth_begin, depth_end;
  const float* bias;  // [out], or null
  Activation activation;
  const float* residual;  // [rows, out], rows residual_stride apart, or null; may be y
  int64_t residual_stride;
  const float* scale;  // [out], or null
  float* y;            // [rows, out], rows y_stride apart
  int64_t y_stride;
  Upcoming after;  // what this thread multiplies after this
};

struct PackedLinearKernels {
  // Floats of scratch memory that a product needs.
  int64_t (*scratch)(int64_t rows, int64_t depth, DType dtype, bool bfloat16_products);
  void (*multiply)(const Product& product, float* scratch);
  // y = gate * layer_norm(x) row by row; gate [rows] or null; x may be y.
  void (*normalise)(const float* x, int64_t x_stride, int64_t rows, int64_t width,
                    const LayerNorm& norm, const float* gate, float* y, int64_t y_stride);
  // Does multiply-adds on registers for the given number of steps, and returns how many.
  int64_t (*multiply_adds)(int64_t steps);
};

// Those that compilers without the target leave out are named all the same.
extern const PackedLinearKernels packed_linear_amx_bf16;
extern const PackedLinearKernels packed_linear_avx512_bf16;
extern const PackedLinearKernels packed_linear_avx512;
extern const PackedLinearKernels packed_linear_avx2;
extern const PackedLinearKernels packed_linear_portable;

// Those of the instruction set in use.
const PackedLinearKernels& packed_linear_kernels();

}  // namespace vitslim
