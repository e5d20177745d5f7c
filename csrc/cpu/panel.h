// Panels: the columns of one head as float32 in cache, whatever their type and stride in memory.
//
// A row panel keeps a token in a row, [tokens][panel_stride(width)], zero beyond the width. A lane
// panel keeps a column in a row, [width][V * LANES], so that a vector holds one column of LANES
// tokens.

#pragma once

#include "../ragged_attention.h"
#include "scratch.h"
#include "vec.h"

namespace vitslim {
namespace {

INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A whole, odd number of cache lines: with an even one, a walk down a column would visit only some
// of the sets of the first-level cache.
INLINE int64_t panel_stride(int64_t width) {
  const int64_t lines = (width + 15) / 16;
  return 16 * (lines | 1);
}

INLINE int64_t bytes_of(DType dtype) { return dtype == DType::FLOAT32 ? 4 : 2; }

// Where the element `index` of an array of the given type begins.
INLINE const void* at(const void* base, int64_t index, DType dtype) {
  return static_cast<const char*>(base) + index * bytes_of(dtype);
}
INLINE void* at(void* base, int64_t index, DType dtype) {
  return static_cast<char*>(base) + index * bytes_of(dtype);
}

template <typename T>
void read_rows(const T* source, int64_t source_stride, int64_t rows, int64_t width, float* panel) {
  const int64_t stride = panel_stride(width);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width; c += LANES)
      store(panel + i * stride + c, load_first(source + i * source_stride + c, width - c));
}

// Rows in memory -> row panel.
inline void read_panel(const void* source, DType dtype, int64_t source_stride, int64_t rows,
                       int64_t width, float* panel) {
  switch (dtype) {
    case DType::FLOAT32:
      return read_rows(static_cast<const float*>(source), source_stride, rows, width, panel);
    case DType::BFLOAT16:
      return read_rows(static_cast<const BFloat16*>(source), source_stride, rows, width, panel);
    case DType::FLOAT16:
      return read_rows(static_cast<const Float16*>(source), source_stride, rows, width, panel);
  }
}

template <typename T>
void write_rows(const float* panel, int64_t rows, int64_t width, const float* factors, T* target,
                int64_t target_stride) {
  const int64_t stride = panel_stride(width);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width; c += LANES)
      store_first(target + i * target_stride + c,
                  mul(load(panel + i * stride + c), load(factors + c)), width - c);
}

// Row panel, each column times its factor -> rows in memory. factors: [round_up(width, LANES)].
inline void write_panel(const float* panel, int64_t rows, int64_t width, const float* factors,
                        void* target, DType dtype, int64_t target_stride) {
  switch (dtype) {
    case DType::FLOAT32:
      return write_rows(panel, rows, width, factors, static_cast<float*>(target), target_stride);
    case DType::BFLOAT16:
      return write_rows(panel, rows, width, factors, static_cast<BFloat16*>(target), target_stride);
    case DType::FLOAT16:
      return write_rows(panel, rows, width, factors, static_cast<Float16*>(target), target_stride);
  }
}

// Row panel, each column times its factor -> lane panel; lanes beyond `rows` become 0.
inline void to_lanes(const float* panel, int64_t rows, int64_t width, const float* factors,
                     int64_t vecs, float* lanes) {
  const int64_t stride = panel_stride(width);
  for (int64_t v = 0; v < vecs; ++v) {
    for (int64_t c = 0; c < width; c += LANES) {
      Vec block[LANES];
      const Vec factor = load(factors + c);
      for (int i = 0; i < LANES; ++i) {
        const int64_t row = v * LANES + i;
        block[i] = row < rows ? mul(factor, load(panel + row * stride + c)) : zero();
      }
      transpose(block);
      for (int i = 0; i < LANES && c + i < width; ++i)
        store(lanes + ((c + i) * vecs + v) * LANES, block[i]);
    }
  }
}

// Lane panel -> row panel of vecs * LANES rows.
inline void to_rows(const float* lanes, int64_t width, int64_t vecs, float* panel) {
  const int64_t stride = panel_stride(width);
  for (int64_t v = 0; v < vecs; ++v) {
    for (int64_t c = 0; c < width; c += LANES) {
      Vec block[LANES];
      for (int i = 0; i < LANES; ++i)
        block[i] = c + i < width ? load(lanes + ((c + i) * vecs + v) * LANES) : zero();
      transpose(block);
      for (int i = 0; i < LANES; ++i) store(panel + (v * LANES + i) * stride + c, block[i]);
    }
  }
}

}  // namespace
}  // namespace vitslim
