// Layer norm of rows, on the way into the left operand of a product.

#pragma once

#include "../packed_linear.h"
#include "vec.h"

namespace vitslim {
namespace {

// The sum over a row of term(its numbers); what lies beyond the width counts as `beyond`.
template <typename Term>
INLINE float sum_row(const float* row, int64_t width, float beyond, const Term& term) {
  // Four chains hide the latency of an addition, and shorten the sums.
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  int64_t c = 0;
  for (; c + 4 * LANES <= width; c += 4 * LANES) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] = term(load(row + c + i * LANES), sums[i]);
  }
  for (; c + LANES <= width; c += LANES) sums[0] = term(load(row + c), sums[0]);
  if (c < width) {
    float rest[LANES];
    for (int64_t i = 0; i < LANES; ++i) rest[i] = c + i < width ? row[c + i] : beyond;
    sums[1] = term(load(rest), sums[1]);
  }
  return sum_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// y = gate * ((x - mean) / sqrt(variance + eps) * weight + bias), row by row. gate [rows] may be
// null. x may be y.
inline void normalise(const float* x, int64_t x_stride, int64_t rows, int64_t width,
                      const LayerNorm& norm, const float* gate, float* y, int64_t y_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = x + r * x_stride;
    float* to = y + r * y_stride;
    const float mean =
        sum_row(from, width, 0.0f, [](Vec part, Vec sum) { return add(part, sum); }) / width;
    const Vec center = broadcast(mean);
    const float variance = sum_row(from, width, mean,
                                   [&](Vec part, Vec sum) {
                                     const Vec off = sub(part, center);
                                     return fma(off, off, sum);
                                   }) /
                           width;
    const Vec scale = broadcast(1.0f / __builtin_sqrtf(variance + norm.eps));
    const Vec factor = broadcast(gate ? gate[r] : 1.0f);
    for (int64_t c = 0; c < width; c += LANES) {
      const int64_t left = width - c;
      const Vec unit = mul(sub(load_first(from + c, left), center), scale);
      const Vec out = fma(unit, load_first(norm.weight + c, left), load_first(norm.bias + c, left));
      store_first(to + c, mul(out, factor), left);
    }
  }
}

}  // namespace
}  // namespace vitslim
