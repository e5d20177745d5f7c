// Products of bfloat16 pairs by AMX: blocks of up to 32 rows times two panels, as tiles [2][2].

#pragma once

#include "amx_tiles.h"
#include "packed_linear_finish.h"
#include "packed_linear_pairs.h"

namespace vitslim {
namespace {

constexpr int64_t BLOCK_ROWS = 2 * TILE_ROWS;
constexpr int64_t BLOCK_PANELS = 2;
constexpr int64_t RIGHT_TILE = TILE_DEPTH * PANEL;  // numbers of bfloat16

// The panels of a block. A panel's last pairs are fewer than a tile's: what lies behind them is not
// ours to read, nor are its products with zero, which could be NaN. So they stand in memory of
// their own, [panels][16][16][2], zero beyond the depth.
struct BlockPanels {
  const BFloat16* first;  // at depth_begin
  int64_t step;           // from one panel to the next
  int64_t whole;          // tiles
  BFloat16* last;         // null if all tiles are whole
};

// sums += 16 pairs of each row times those of each panel.
template <int R, int C>
INLINE void add_products(Tiles& tiles, const BFloat16* left, int64_t stride, const BFloat16* right,
                         int64_t panel_step) {
  constexpr int64_t BYTES = sizeof(BFloat16);
  tiles.load_left<0>(left, stride * BYTES);
  tiles.load_right<0>(right);
  tiles.dot<0, 0>();
  if constexpr (C == 2) {
    tiles.load_right<1>(right + panel_step);
    tiles.dot<0, 1>();
  }
  if constexpr (R == 2) {
    tiles.load_left<1>(left + TILE_ROWS * stride, stride * BYTES);
    tiles.dot<1, 0>();
    if constexpr (C == 2) tiles.dot<1, 1>();
  }
}

// sums [up to R * 16][C * 16] = the rows of `left`, stride apart, times C panels.
template <int R, int C>
INLINE void multiply_block(Tiles& tiles, const BFloat16* left, int64_t stride,
                           const BlockPanels& right, float* sums) {
  tiles.clear<0, 0>();
  if constexpr (C == 2) tiles.clear<0, 1>();
  if constexpr (R == 2) tiles.clear<1, 0>();
  if constexpr (R == 2 && C == 2) tiles.clear<1, 1>();
  for (int64_t k = 0; k < right.whole; ++k)
    add_products<R, C>(tiles, left + k * TILE_DEPTH, stride, right.first + k * RIGHT_TILE,
                       right.step);
  if (right.last)
    add_products<R, C>(tiles, left + right.whole * TILE_DEPTH, stride, right.last, RIGHT_TILE);
  constexpr int64_t BYTES = C * PANEL * sizeof(float);
  float* below = sums + TILE_ROWS * C * PANEL;
  tiles.store<0, 0>(sums, BYTES);
  if constexpr (C == 2) tiles.store<0, 1>(sums + PANEL, BYTES);
  if constexpr (R == 2) tiles.store<1, 0>(below, BYTES);
  if constexpr (R == 2 && C == 2) tiles.store<1, 1>(below + PANEL, BYTES);
}

// All rows times C panels, which begin at `column`.
template <int C>
void multiply_rows_by_tiles(const Product& p, Tiles& tiles, const BFloat16* left, int64_t stride,
                            const BlockPanels& right, int64_t column) {
  alignas(64) float sums[BLOCK_ROWS * C * PANEL];
  const FinishBlock finish = finish_of(p.activation);
  for (int64_t row = 0; row < p.rows; row += BLOCK_ROWS) {
    const int64_t rows = p.rows - row < BLOCK_ROWS ? p.rows - row : BLOCK_ROWS;
    if (rows > TILE_ROWS) {
      tiles.shape(TILE_ROWS, rows - TILE_ROWS);
      multiply_block<2, C>(tiles, left + row * stride, stride, right, sums);
    } else {
      tiles.shape(rows, 0);
      multiply_block<1, C>(tiles, left + row * stride, stride, right, sums);
    }
    finish(p, sums, rows, C * PANEL / LANES, row, column);
  }
}

inline int64_t bfloat16_scratch(int64_t rows, int64_t depth) {
  return rows * pairs_stride(depth) + BLOCK_PANELS * RIGHT_TILE / 2;
}

inline void multiply_bfloat16(const Product& p, float* scratch) {
  const int64_t depth = p.depth_end - p.depth_begin, whole = depth / TILE_DEPTH;
  const int64_t rest = round_up(depth, 2) - whole * TILE_DEPTH;
  round_to_pairs(p, scratch);
  const BFloat16* left = reinterpret_cast<const BFloat16*>(scratch);
  const int64_t stride = 2 * pairs_stride(depth);
  BFloat16* last = reinterpret_cast<BFloat16*>(scratch + p.rows * stride / 2);
  if (rest) std::memset(last, 0, BLOCK_PANELS * RIGHT_TILE * sizeof(BFloat16));
  Tiles tiles;
  const Split groups(p.panel_end - p.panel_begin, BLOCK_PANELS);
  for (int64_t i = 0; i < groups.pieces; ++i) {
    const int64_t panel = p.panel_begin + groups.begin(i);
    const int64_t panels = groups.begin(i + 1) - groups.begin(i);
    const BlockPanels right{panel_pairs(p, panel), panel_step(p), whole, rest ? last : nullptr};
    for (int64_t each = 0; each < panels && rest; ++each)
      std::memcpy(last + each * RIGHT_TILE, right.first + each * right.step + whole * RIGHT_TILE,
                  rest * PANEL * sizeof(BFloat16));
    if (panels == 1) multiply_rows_by_tiles<1>(p, tiles, left, stride, right, panel * PANEL);
    if (panels == 2) multiply_rows_by_tiles<2>(p, tiles, left, stride, right, panel * PANEL);
  }
}

}  // namespace
}  // namespace vitslim
