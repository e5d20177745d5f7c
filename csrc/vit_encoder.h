// A vision transformer from the image to its last tokens, dense or slim, in one call.
//
//   x = start + patches(image) W^T                      start: class tokens, positions, patch bias
//   in each block, where x loses the rows that the block drops first:
//     x += ls1 * proj(ragged_attention(qkv(gate * layer_norm(x))))
//     x += ls2 * fc2(f(fc1(gate * layer_norm(x))))
//   out = layer_norm(x)[:rows]                          the last block computes no other row
//
// The model stands in three arrays.
//
// layout, integers:
//   1 (the version), in_chans, patch_height, patch_width, embed_dim, prefix (leading rows of start
//   that have no patch), pre_norm, final_norm (0 or 1), number of blocks, then for each block
//   heads, hidden, activation, selects (0 or 1), gated (0 or 1), kept,
//   the heads' widths [heads], and if the block selects, the rows of x that stay [kept], else
//   kept is 0
// vectors, float32, each piece filled up with zeros to a multiple of 16, with C = embed_dim and D
// the sum of the heads' widths; a bias that the model has not is zero, a layer scale that it has
// not one:
//   with pre_norm    (eps), weight [C], bias [C]
//   each block       (softmax scale, eps of norm1, eps of norm2),
//                    norm1 weight [C], bias [C], qkv bias [3 D], proj bias [C], ls1 [C],
//                    norm2 weight [C], bias [C], fc1 bias [hidden], fc2 bias [C], ls2 [C],
//                    if gated, gate [tokens of the block]
//   with final_norm  (eps), weight [C], bias [C]
// panels, float32 or bfloat16, packed as packed_linear.h says, one after the other:
//   patches [C, in_chans * patch_height * patch_width],
//   each block       qkv [3 D, C], proj [C, D], fc1 [hidden, C], fc2 [C, hidden]

#pragma once

#include <cstdint>

#include "dtype.h"
#include "threads.h"

namespace vitslim {

struct VitEncoder {
  const float* images;  // [batch, in_chans, height, width], contiguous
  int64_t batch, in_chans, height, width;
  const float* start;  // [tokens, embed_dim], contiguous
  int64_t tokens, embed_dim;
  const float* vectors;
  int64_t vector_elements;
  const void* panels;
  DType dtype;  // of panels
  bool bfloat16_products;
  int64_t panel_elements;
  const int64_t* layout;
  int64_t layout_elements;
  float* out;  // [batch, rows, embed_dim], contiguous
  int64_t rows;
};

// Throws std::runtime_error with one sentence where the arrays do not fit each other; reads and
// writes nothing beyond them.
void vit_encoder_cpu(const VitEncoder& call, const Threads& threads);

}  // namespace vitslim
