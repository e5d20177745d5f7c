// Which head a block works on, and code made for that head's width.

#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../ragged_attention.h"
#include "tile.cuh"

namespace vitslim {

struct Head {
  int index, offset, width;
};

// Handed to a kernel by value: nothing to allocate or copy, and a CUDA graph keeps it.
struct HeadTable {
  static constexpr int SIZE = 128;
  int count;
  int columns;  // D
  Head heads[SIZE];
};

// The heads in tables of one launch each, widest first: the widest start first, so that what is
// left for the end of the launch is short.
inline std::vector<HeadTable> head_tables(const RaggedAttentionShape& shape) {
  std::vector<Head> heads;
  for (int64_t h = 0; h < shape.heads; ++h) {
    const int64_t offset = shape.head_offsets[h], width = shape.head_offsets[h + 1] - offset;
    if (width > CUDA_HEAD_WIDTH)
      throw std::runtime_error(
          "ragged_attention: head " + std::to_string(h) + " is " + std::to_string(width) +
          " wide, and the CUDA kernels hold " + std::to_string(CUDA_HEAD_WIDTH) +
          "; use another backend, vitslim.use_backend(\"reference\", \"ragged_attention\").");
    heads.push_back({int(h), int(offset), int(width)});
  }
  std::stable_sort(heads.begin(), heads.end(),
                   [](const Head& a, const Head& b) { return a.width > b.width; });
  std::vector<HeadTable> tables;
  for (size_t first = 0; first < heads.size(); first += HeadTable::SIZE) {
    HeadTable& table = tables.emplace_back();
    table.count = int(std::min<size_t>(HeadTable::SIZE, heads.size() - first));
    table.columns = int(shape.head_offsets[shape.heads]);
    std::copy_n(heads.begin() + int64_t(first), table.count, table.heads);
  }
  return tables;
}

// Calls body(std::integral_constant<int, W>()) with W the width rounded up to a multiple of 16, at
// most WIDEST. A width of 0 is rounded to 16.
template <int WIDEST, int W = 16, typename Body>
__device__ __forceinline__ void with_width(int width, const Body& body) {
  if constexpr (W < WIDEST) {
    if (width > W) return with_width<WIDEST, W + 16>(width, body);
  }
  body(std::integral_constant<int, W>());
}

// The W of with_width.
inline int padded_width(int width) { return width > 16 ? (width + 15) / 16 * 16 : 16; }

// Whether all rows of all heads whose offset is aligned start on 16 bytes.
template <typename E>
bool rows_aligned(const void* first, int64_t batch_stride, int64_t token_stride, int64_t columns) {
  constexpr int64_t UNIT = 16 / sizeof(E);
  return reinterpret_cast<uintptr_t>(first) % 16 == 0 && batch_stride % UNIT == 0 &&
         token_stride % UNIT == 0 && columns % UNIT == 0;
}

}  // namespace vitslim
