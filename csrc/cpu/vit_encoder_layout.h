// The arrays of vit_encoder.h, read and checked: where every part of the model stands.

#pragma once

#include <vector>

#include "../packed_linear.h"
#include "../vit_encoder.h"

namespace vitslim {

struct EncoderBlock {
  int64_t heads, attn_dim, hidden, tokens;  // tokens: those that this block works on
  Activation activation;
  const int64_t* head_offsets;  // [heads + 1]
  const int64_t* rows;          // [tokens] of the block before, or null where all stay
  const float* gate;            // [tokens], or null
  float scale;                  // of the softmax
  LayerNorm norm1, norm2;
  PackedWeight qkv, proj, fc1, fc2;
  const float *qkv_bias, *proj_bias, *ls1, *fc1_bias, *fc2_bias, *ls2;
};

struct EncoderLayout {
  int64_t patch_height, patch_width, prefix;
  bool has_pre_norm, has_final_norm;
  LayerNorm pre_norm, final_norm;
  PackedWeight patches;
  std::vector<EncoderBlock> blocks;
  std::vector<int64_t> head_offsets;  // of all blocks
  // The largest of all blocks.
  int64_t widest_attention, most_hidden;

  // Reads the call's arrays, which must outlive this. Keeps the memory of earlier calls.
  // Throws std::runtime_error where they do not fit.
  void read(const VitEncoder& call);
};

}  // namespace vitslim
