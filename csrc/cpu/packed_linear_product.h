// Products with packed weights by float32 multiply-adds. bfloat16 panels are widened once for all
// rows of the call.

#pragma once

#include "packed_linear_tiles.h"
#include "panel.h"

namespace vitslim {
namespace {

// One panel of bfloat16 pairs [pairs][16][2] -> float32 [depth][16].
inline void widen_panel(const BFloat16* pairs, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; k += 2) {
    for (int64_t c = 0; c < PANEL; c += LANES) {
      Vec even, odd;
      load_pairs(pairs + k * PANEL + 2 * c, &even, &odd);
      store(panel + k * PANEL + c, even);
      store(panel + (k + 1) * PANEL + c, odd);
    }
  }
}

// x -> its numbers rounded to bfloat16, still as float32.
inline void round_rows(const float* x, int64_t stride, int64_t rows, int64_t width, float* rounded,
                       int64_t rounded_stride) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; c += LANES)
      store_first(rounded + r * rounded_stride + c,
                  round_to_bfloat16(load_first(x + r * stride + c, width - c)), width - c);
}

inline int64_t product_scratch(int64_t rows, int64_t depth, DType dtype, bool bfloat16_products) {
  int64_t floats = 0;
  if (dtype == DType::BFLOAT16) floats += TILE_PANELS * PANEL * round_up(depth, 2);
  if (bfloat16_products) floats += rows * panel_stride(depth);
  return floats;
}

inline void multiply_panels(const Product& product, float* scratch) {
  Product p = product;
  const int64_t depth = p.depth_end - p.depth_begin;
  const bool wide = p.weight.dtype == DType::FLOAT32;
  const int64_t widened_step = round_up(depth, 2) * PANEL;
  if (p.weight.bfloat16_products) {
    float* rounded = scratch + TILE_PANELS * widened_step;
    round_rows(p.x, p.x_stride, p.rows, depth, rounded, panel_stride(depth));
    p.x = rounded;
    p.x_stride = panel_stride(depth);
  }
  const int64_t panel_step = (wide ? p.weight.in : round_up(p.weight.in, 2)) * PANEL;
  const Split groups(p.panel_end - p.panel_begin, TILE_PANELS);
  for (int64_t i = 0; i < groups.pieces; ++i) {
    const int64_t panel = p.panel_begin + groups.begin(i);
    const int64_t panels = groups.begin(i + 1) - groups.begin(i);
    const int64_t first = panel * panel_step + p.depth_begin * PANEL;
    if (wide) {
      const float* right = static_cast<const float*>(p.weight.panels) + first;
      run_group<MultiplyAdd>(p, right, panel_step, depth, panel, panels,
                             next_group(p, panel + panels));
    } else {
      const BFloat16* pairs = static_cast<const BFloat16*>(p.weight.panels) + first;
      for (int64_t each = 0; each < panels; ++each)
        widen_panel(pairs + each * panel_step, depth, scratch + each * widened_step);
      run_group<MultiplyAdd>(p, scratch, widened_step, depth, panel, panels, {});
    }
  }
}

}  // namespace
}  // namespace vitslim
