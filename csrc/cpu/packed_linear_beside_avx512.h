// The table of a unit that has bfloat16 products of its own and leaves all else to AVX512's unit.
// Include it after bfloat16_scratch and multiply_bfloat16.

#pragma once

#include "packed_linear_kernels.h"

namespace vitslim {
namespace {

// Functions that hand on, because a table copied from the other would be made at program start, by
// code that machines without this target run too.
int64_t scratch_beside(int64_t rows, int64_t depth, DType dtype, bool bfloat16_products) {
  return bfloat16_products ? bfloat16_scratch(rows, depth)
                           : packed_linear_avx512.scratch(rows, depth, dtype, false);
}

void multiply_beside(const Product& product, float* scratch) {
  product.weight.bfloat16_products ? multiply_bfloat16(product, scratch)
                                   : packed_linear_avx512.multiply(product, scratch);
}

void normalise_beside(const float* x, int64_t x_stride, int64_t rows, int64_t width,
                      const LayerNorm& norm, const float* gate, float* y, int64_t y_stride) {
  packed_linear_avx512.normalise(x, x_stride, rows, width, norm, gate, y, y_stride);
}

int64_t multiply_adds_beside(int64_t steps) { return packed_linear_avx512.multiply_adds(steps); }

constexpr PackedLinearKernels BESIDE_AVX512 = {scratch_beside, multiply_beside, normalise_beside,
                                               multiply_adds_beside};

}  // namespace
}  // namespace vitslim
