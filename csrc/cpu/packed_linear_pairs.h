// The left operand of bfloat16 products: rounded to bfloat16, neighbours of the sum side by side,
// as the panels have them. A pair stands in the place of one float.

#pragma once

#include "packed_linear_kernels.h"
#include "panel.h"

namespace vitslim {
namespace {

// Pairs from one row to the next: a whole, odd number of cache lines.
INLINE int64_t pairs_stride(int64_t depth) { return panel_stride((depth + 1) / 2); }

// p.x -> pairs [p.rows][pairs_stride], zero beyond the depth.
inline void round_to_pairs(const Product& p, float* pairs) {
  const int64_t depth = p.depth_end - p.depth_begin, stride = pairs_stride(depth);
  // As far as a tile of 16 pairs reads, which the stride always has room for.
  const int64_t width = round_up(depth, 2 * PANEL);
  for (int64_t r = 0; r < p.rows; ++r) {
    BFloat16* row = reinterpret_cast<BFloat16*>(pairs + r * stride);
    for (int64_t c = 0; c < width; c += LANES) {
      const int64_t left = depth > c ? depth - c : 0;
      store_first(row + c, load_first(p.x + r * p.x_stride + c, left), LANES);
    }
  }
}

// Numbers of bfloat16 from one panel to the next.
INLINE int64_t panel_step(const Product& p) { return round_up(p.weight.in, 2) * PANEL; }

// The panel of that number at depth_begin, which is even and so the begin of a pair.
INLINE const BFloat16* panel_pairs(const Product& p, int64_t panel) {
  return static_cast<const BFloat16*>(p.weight.panels) + panel * panel_step(p) +
         p.depth_begin * PANEL;
}

}  // namespace
}  // namespace vitslim
