// Products of bfloat16 pairs by an instruction that multiplies two pairs and adds both products to
// a float32 sum. Panels are read in place.

#pragma once

#include "packed_linear_pairs.h"
#include "packed_linear_tiles.h"

namespace vitslim {
namespace {

// A step of a sum of such products; the operands are pairs, whatever their type says.
struct DotPairs {
  static INLINE Vec run(Vec left, Vec right, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  }
};

inline int64_t bfloat16_scratch(int64_t rows, int64_t depth) { return rows * pairs_stride(depth); }

inline void multiply_bfloat16(const Product& product, float* scratch) {
  Product p = product;
  const int64_t depth = p.depth_end - p.depth_begin;
  round_to_pairs(p, scratch);
  p.x = scratch;
  p.x_stride = pairs_stride(depth);
  const Split groups(p.panel_end - p.panel_begin, TILE_PANELS);
  for (int64_t i = 0; i < groups.pieces; ++i) {
    const int64_t panel = p.panel_begin + groups.begin(i);
    const int64_t panels = groups.begin(i + 1) - groups.begin(i);
    run_group<DotPairs>(p, reinterpret_cast<const float*>(panel_pairs(p, panel)), panel_step(p) / 2,
                        (depth + 1) / 2, panel, panels, next_group(p, panel + panels));
  }
}

}  // namespace
}  // namespace vitslim
