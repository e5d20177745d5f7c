// A model as the kernels read it: the packed format of packed_linear.h and vit_encoder.h, written
// here a second time from their words.

#pragma once

#include <cstdint>
#include <vector>

#include "../../csrc/packed_linear.h"
#include "../../csrc/vit_encoder.h"
#include "bfloat16.h"
#include "exact.h"
#include "model.h"

namespace stress {

// Panels of either type; the other one is empty.
struct Panels {
  vitslim::DType dtype;
  Exact<float> floats;
  Exact<uint16_t> halves;

  const void* data() const {
    return dtype == vitslim::DType::FLOAT32 ? static_cast<const void*>(floats.data())
                                            : halves.data();
  }
  int64_t size() const { return dtype == vitslim::DType::FLOAT32 ? floats.size() : halves.size(); }
};

inline void append_float32(const Linear& linear, std::vector<float>& panels) {
  for (int64_t panel = 0; panel < linear.out; panel += 16)
    for (int64_t k = 0; k < linear.in; ++k)
      for (int64_t row = panel; row < panel + 16; ++row)
        panels.push_back(row < linear.out ? linear.weight[row * linear.in + k] : 0.0f);
}

inline void append_bfloat16(const Linear& linear, std::vector<uint16_t>& panels) {
  for (int64_t panel = 0; panel < linear.out; panel += 16)
    for (int64_t pair = 0; pair < linear.in; pair += 2)
      for (int64_t row = panel; row < panel + 16; ++row)
        for (int64_t k = pair; k < pair + 2; ++k)
          panels.push_back(row < linear.out && k < linear.in
                               ? to_bfloat16(linear.weight[row * linear.in + k])
                               : uint16_t(0));
}

template <typename T>
Exact<T> exactly(const std::vector<T>& values, int64_t shift) {
  Exact<T> array(int64_t(values.size()), shift);
  std::copy(values.begin(), values.end(), array.begin());
  return array;
}

inline Panels pack(const std::vector<const Linear*>& linears, vitslim::DType dtype, int64_t shift) {
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  for (const Linear* linear : linears) {
    if (dtype == vitslim::DType::FLOAT32) append_float32(*linear, floats);
    if (dtype == vitslim::DType::BFLOAT16) append_bfloat16(*linear, halves);
  }
  return {dtype, exactly(floats, shift), exactly(halves, shift)};
}

// What a call takes beside the images, with the model's sizes as a caller would give them.
struct PackedModel {
  Exact<int64_t> layout;
  Exact<float> vectors, start;
  Panels panels;
  bool bfloat16_products;
  int64_t in_chans, height, width, tokens, embed_dim, rows;
};

class VectorsWriter {
 public:
  void piece(const Floats& values) {
    values_.insert(values_.end(), values.begin(), values.end());
    while (values_.size() % 16) values_.push_back(0);
  }
  void norm(const Norm& norm) {
    piece(norm.weight);
    piece(norm.bias);
  }
  void block(const Block& block) {
    piece({block.softmax_scale, block.norm1.eps, block.norm2.eps});
    norm(block.norm1);
    piece(block.qkv.bias);
    piece(block.proj.bias);
    piece(block.ls1);
    norm(block.norm2);
    piece(block.fc1.bias);
    piece(block.fc2.bias);
    piece(block.ls2);
    if (!block.gate.empty()) piece(block.gate);
  }
  const std::vector<float>& values() const { return values_; }

 private:
  std::vector<float> values_;
};

inline PackedModel pack(const Model& model, int64_t shift = 0) {
  std::vector<int64_t> layout = {1,
                                 model.in_chans,
                                 model.patch_height,
                                 model.patch_width,
                                 model.embed_dim,
                                 model.prefix,
                                 model.has_pre_norm,
                                 model.has_final_norm,
                                 int64_t(model.blocks.size())};
  VectorsWriter vectors;
  std::vector<const Linear*> linears = {&model.patches};
  if (model.has_pre_norm) {
    vectors.piece({model.pre_norm.eps});
    vectors.norm(model.pre_norm);
  }
  for (const Block& block : model.blocks) {
    for (const int64_t number :
         {int64_t(block.heads.size()), block.fc1.out, block.activation, int64_t(block.selects),
          int64_t(!block.gate.empty()), int64_t(block.kept.size())})
      layout.push_back(number);
    layout.insert(layout.end(), block.heads.begin(), block.heads.end());
    layout.insert(layout.end(), block.kept.begin(), block.kept.end());
    vectors.block(block);
    for (const Linear* linear : {&block.qkv, &block.proj, &block.fc1, &block.fc2})
      linears.push_back(linear);
  }
  if (model.has_final_norm) {
    vectors.piece({model.final_norm.eps});
    vectors.norm(model.final_norm);
  }
  return {exactly(layout, 0),
          exactly(vectors.values(), shift),
          exactly(model.start, shift),
          pack(linears, model.dtype, shift),
          model.bfloat16_products,
          model.in_chans,
          model.height(),
          model.width(),
          model.tokens(),
          model.embed_dim,
          model.rows};
}

// One call of the encoder. images: [batch, in_chans, height, width]; out: [batch, rows, embed_dim].
inline void encode(const PackedModel& model, const float* images, int64_t batch, float* out,
                   const vitslim::Threads& threads) {
  const vitslim::VitEncoder call = {images,
                                    batch,
                                    model.in_chans,
                                    model.height,
                                    model.width,
                                    model.start.data(),
                                    model.tokens,
                                    model.embed_dim,
                                    model.vectors.data(),
                                    model.vectors.size(),
                                    model.panels.data(),
                                    model.panels.dtype,
                                    model.bfloat16_products,
                                    model.panels.size(),
                                    model.layout.data(),
                                    model.layout.size(),
                                    out,
                                    model.rows};
  vitslim::vit_encoder_cpu(call, threads);
}

}  // namespace stress
