// Rows times panels, a tile at a time: a tile of rows times up to four panels in registers, and
// what follows the sum while it is there.
//
// A tile takes its rows of x as numbers to broadcast and the panels as vectors, each panel a stream
// of its own. The panels of a tile stay in the second-level cache while all rows pass by; x is
// read once for each group of panels.

#pragma once

#include "packed_linear_finish.h"
#include "tile.h"

namespace vitslim {
namespace {

// With vectors as wide as a panel a tile takes several panels, else one.
constexpr int64_t TILE_PANELS = LANES == PANEL ? MAX_VECS : 1;

// What a tile does with its sums.
enum class Finish {
  STORE,  // whole vectors, plus the bias
  ADD,    // whole vectors: residual + scale * (sums + bias)
  BLOCK,  // anything else, through memory
};

// The vectors of the panels that a tile takes, at depth_begin.
struct Right {
  const float* first;
  int64_t vec_step;
  int64_t steps;  // of the sum
  Upcoming next;
};

// Rows of x times the panels from `column` on.
template <typename Step, Finish F>
struct PanelTiles {
  const Product& p;
  Right right;
  int64_t column;
  FinishBlock finish;

  template <int R, int V>
  INLINE void run(int64_t row) const {
    Vec sums[R][V];
    clear_tile(sums);
    const float* left = p.x + row * p.x_stride;
    // The first tiles of rows fetch one of the next panels each: a line at a step, which leaves the
    // loads of the product their bandwidth.
    const int64_t tile = (row + MAX_ROWS<V> - 1) / MAX_ROWS<V>;
    if (tile < right.next.panels) {
      vitslim::multiply<Step, true>(left, p.x_stride, 1, right.first, PANEL, right.vec_step,
                                    right.steps, sums, right.next.first + tile * right.next.step);
    } else {
      vitslim::multiply<Step>(left, p.x_stride, 1, right.first, PANEL, right.vec_step, right.steps,
                              sums);
    }
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

template <typename Step, int V, Finish F>
void run_panels(const Product& p, const Right& right, int64_t column) {
  run_tiles<V>(PanelTiles<Step, F>{p, right, column, finish_of(p.activation)}, p.rows);
}

template <typename Step, int V>
void run_vecs(const Product& p, const Right& right, int64_t column) {
  const bool whole = column + V * LANES <= p.weight.out && p.activation == Activation::NONE;
  if (whole && !p.residual) return run_panels<Step, V, Finish::STORE>(p, right, column);
  if (whole) return run_panels<Step, V, Finish::ADD>(p, right, column);
  run_panels<Step, V, Finish::BLOCK>(p, right, column);
}

// The rows of p.x times `panels` panels from the number `panel` on, which begin at `right` and lie
// panel_step apart; each step of the sum takes a vector of every panel. `next` is fetched
// meanwhile.
template <typename Step>
void run_group(const Product& p, const float* right, int64_t panel_step, int64_t steps,
               int64_t panel, int64_t panels, const Upcoming& next) {
  if constexpr (LANES == PANEL) {
    const Right all{right, panel_step, steps, next};
    const int64_t column = panel * PANEL;
    if (panels == 1) run_vecs<Step, 1>(p, all, column);
    if (panels == 2) run_vecs<Step, 2>(p, all, column);
    if constexpr (MAX_VECS >= 4) {
      if (panels == 3) run_vecs<Step, 3>(p, all, column);
      if (panels == 4) run_vecs<Step, 4>(p, all, column);
    }
  } else {
    // A panel is several vectors side by side, and those beyond `out` are left out.
    const int64_t left = p.weight.out - panel * PANEL;
    const Split pieces(((left < PANEL ? left : PANEL) + LANES - 1) / LANES, MAX_VECS);
    for (int64_t i = 0; i < pieces.pieces; ++i) {
      const int64_t begin = pieces.begin(i) * LANES, vecs = pieces.begin(i + 1) - pieces.begin(i);
      const Right some{right + begin, LANES, steps, next};
      if (vecs == 1) run_vecs<Step, 1>(p, some, panel * PANEL + begin);
      if (vecs == 2) run_vecs<Step, 2>(p, some, panel * PANEL + begin);
    }
  }
}

// The group after the one that ends before `panel`, or what comes after the product.
inline Upcoming next_group(const Product& p, int64_t panel) {
  const int64_t left = p.panel_end - panel;
  if (left <= 0) return p.after;
  return upcoming(p.weight, panel, left < TILE_PANELS ? left : TILE_PANELS, p.depth_begin);
}

}  // namespace
}  // namespace vitslim
