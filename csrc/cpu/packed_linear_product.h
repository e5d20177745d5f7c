// Products with packed weights: a tile of rows times up to four panels in registers, and what
// follows the sum while it is there.
//
// A tile takes its rows of x as numbers to broadcast and the panels as vectors, each panel a stream
// of its own. The panels of a tile stay in the second-level cache while all rows pass by; x is
// read once for each group of panels. bfloat16 panels are widened once for all rows of the call.

#pragma once

#include "activation.h"
#include "panel.h"
#include "tile.h"

namespace vitslim {
namespace {

// With vectors as wide as a panel a tile takes several panels, else one.
constexpr int64_t TILE_PANELS = LANES == PANEL ? MAX_VECS : 1;

// The part of a block that lies in one vector of columns, which begins at `c`.
struct BlockColumn {
  const float* sums;
  int64_t sums_stride;
  const float* residual;
  float* y;
  Vec bias, scale;
  int64_t columns;
};

// y = residual + scale * activate(sums + bias) for the rows row..row + N.
template <Activation A, int N>
INLINE void finish_rows(const Product& p, const BlockColumn& block, int64_t row) {
  Vec out[N];
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i)
    out[i] = add(load(block.sums + (row + i) * block.sums_stride), block.bias);
  activate<A>(out);
#pragma GCC unroll 6
  for (int i = 0; i < N; ++i) {
    if (block.residual) {
      const float* residual = block.residual + (row + i) * p.residual_stride;
      out[i] = fma(out[i], block.scale, load_first(residual, block.columns));
    }
    float* y = block.y + (row + i) * p.y_stride;
    block.columns >= LANES ? store(y, out[i]) : store_first(y, out[i], block.columns);
  }
}

template <Activation A, int N>
INLINE void run_rows(const Product& p, const BlockColumn& block, int64_t row, int64_t rows) {
  if (rows == N) {
    finish_rows<A, N>(p, block, row);
  } else if constexpr (N > 1) {
    run_rows<A, N - 1>(p, block, row, rows);
  }
}

// The same for a block of [rows][vecs] vectors in memory, which begins at `row` and `column` of y.
template <Activation A>
void finish_block(const Product& p, const float* sums, int64_t rows, int64_t vecs, int64_t row,
                  int64_t column) {
  for (int64_t v = 0; v < vecs; ++v) {
    const int64_t c = column + v * LANES, columns = p.weight.out - c;
    if (columns <= 0) return;
    const BlockColumn block{sums + v * LANES,
                            vecs * LANES,
                            p.residual ? p.residual + row * p.residual_stride + c : nullptr,
                            p.y + row * p.y_stride + c,
                            p.bias ? load_first(p.bias + c, columns) : zero(),
                            p.scale ? load_first(p.scale + c, columns) : broadcast(1.0f),
                            columns};
    const Split pieces(rows, 6);
    for (int64_t i = 0; i < pieces.pieces; ++i) {
      const int64_t first = pieces.begin(i);
      run_rows<A, 6>(p, block, first, pieces.begin(i + 1) - first);
    }
  }
}

using FinishBlock = void (*)(const Product&, const float*, int64_t, int64_t, int64_t, int64_t);

inline FinishBlock finish_of(Activation activation) {
  switch (activation) {
    case Activation::GELU:
      return finish_block<Activation::GELU>;
    case Activation::GELU_TANH:
      return finish_block<Activation::GELU_TANH>;
    case Activation::QUICK_GELU:
      return finish_block<Activation::QUICK_GELU>;
    case Activation::SILU:
      return finish_block<Activation::SILU>;
    case Activation::RELU:
      return finish_block<Activation::RELU>;
    default:
      return finish_block<Activation::NONE>;
  }
}

// What a tile does with its sums.
enum class Finish {
  STORE,  // whole vectors, plus the bias
  ADD,    // whole vectors: residual + scale * (sums + bias)
  BLOCK,  // anything else, through memory
};

// Rows of x times the panels from `column` on.
template <Finish F>
struct PanelTiles {
  const Product& p;
  const float* right;  // the first vector of the panels, at depth_begin
  int64_t vec_step;
  int64_t column;
  FinishBlock finish;

  template <int R, int V>
  INLINE void run(int64_t row) const {
    Vec sums[R][V];
    clear_tile(sums);
    vitslim::multiply(p.x + row * p.x_stride, p.x_stride, 1, right, PANEL, vec_step,
                      p.depth_end - p.depth_begin, sums);
    if constexpr (F == Finish::BLOCK) {
      alignas(64) float block[R * V * LANES];
      store_tile(block, V * LANES, sums);
      return finish(p, block, R, V, row, column);
    }
    Vec bias[V], scale[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      bias[v] = p.bias ? load(p.bias + column + v * LANES) : zero();
      if constexpr (F == Finish::ADD)
        scale[v] = p.scale ? load(p.scale + column + v * LANES) : broadcast(1.0f);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* y = p.y + (row + r) * p.y_stride + column;
      const float* residual = p.residual + (row + r) * p.residual_stride + column;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Vec out = add(sums[r][v], bias[v]);
        if constexpr (F == Finish::ADD) out = fma(out, scale[v], load(residual + v * LANES));
        store(y + v * LANES, out);
      }
    }
  }
};

template <int V, Finish F>
void run_panels(const Product& p, const float* right, int64_t vec_step, int64_t column) {
  run_tiles<V>(PanelTiles<F>{p, right, vec_step, column, finish_of(p.activation)}, p.rows);
}

template <int V>
void run_vecs(const Product& p, const float* right, int64_t vec_step, int64_t column) {
  const bool whole = column + V * LANES <= p.weight.out && p.activation == Activation::NONE;
  if (whole && !p.residual) return run_panels<V, Finish::STORE>(p, right, vec_step, column);
  if (whole) return run_panels<V, Finish::ADD>(p, right, vec_step, column);
  run_panels<V, Finish::BLOCK>(p, right, vec_step, column);
}

// The vectors of `panels` panels from the number `panel` on; `right` is where the first begins.
inline void run_group(const Product& p, const float* right, int64_t panel_step, int64_t panel,
                      int64_t panels) {
  if constexpr (LANES == PANEL) {
    const int64_t column = panel * PANEL;
    if (panels == 1) run_vecs<1>(p, right, panel_step, column);
    if (panels == 2) run_vecs<2>(p, right, panel_step, column);
    if constexpr (MAX_VECS >= 4) {
      if (panels == 3) run_vecs<3>(p, right, panel_step, column);
      if (panels == 4) run_vecs<4>(p, right, panel_step, column);
    }
  } else {
    // A panel is several vectors side by side, and those beyond `out` are left out.
    const int64_t left = p.weight.out - panel * PANEL;
    const Split pieces(round_up(left < PANEL ? left : PANEL, LANES) / LANES, MAX_VECS);
    for (int64_t i = 0; i < pieces.pieces; ++i) {
      const int64_t begin = pieces.begin(i) * LANES, vecs = pieces.begin(i + 1) - pieces.begin(i);
      if (vecs == 1) run_vecs<1>(p, right + begin, LANES, panel * PANEL + begin);
      if (vecs == 2) run_vecs<2>(p, right + begin, LANES, panel * PANEL + begin);
    }
  }
}

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
      run_group(p, right, panel_step, panel, panels);
    } else {
      const BFloat16* pairs = static_cast<const BFloat16*>(p.weight.panels) + first;
      for (int64_t each = 0; each < panels; ++each)
        widen_panel(pairs + each * panel_step, depth, scratch + each * widened_step);
      run_group(p, scratch, widened_step, panel, panels);
    }
  }
}

}  // namespace
}  // namespace vitslim
