// A random vision transformer: everything that vit_encoder.h can describe, at small sizes.

#pragma once

#include <cmath>
#include <cstdint>
#include <numeric>
#include <sstream>
#include <string>
#include <vector>

#include "../../csrc/dtype.h"
#include "../../csrc/packed_linear.h"
#include "bfloat16.h"
#include "random.h"

namespace stress {

using Floats = std::vector<float>;

struct Norm {
  float eps;
  Floats weight, bias;  // [in]
};

struct Linear {
  int64_t in, out;
  Floats weight;  // [out, in]
  Floats bias;    // [out]
};

struct Block {
  std::vector<int64_t> heads;  // their widths
  int64_t activation;
  bool selects;
  std::vector<int64_t> kept;  // rows of x, where the block selects
  int64_t tokens;             // that are left in this block
  float softmax_scale;
  Norm norm1, norm2;
  Linear qkv, proj, fc1, fc2;
  Floats ls1, ls2;  // [embed_dim]
  Floats gate;      // [tokens], or empty
};

struct Model {
  int64_t in_chans, patch_height, patch_width, embed_dim, prefix;
  int64_t grid_height, grid_width;
  bool has_pre_norm, has_final_norm;
  Norm pre_norm, final_norm;
  Linear patches;  // without a bias
  Floats start;    // [tokens, embed_dim]
  std::vector<Block> blocks;
  vitslim::DType dtype;  // of the packed weights, to which these here are rounded already
  bool bfloat16_products;
  int64_t rows;  // of the result

  int64_t tokens() const { return prefix + grid_height * grid_width; }
  int64_t height() const { return grid_height * patch_height; }
  int64_t width() const { return grid_width * patch_width; }
  int64_t image_elements() const { return in_chans * height() * width(); }
};

// How large a model may get.
struct Limits {
  int64_t embed_dim = 130, heads = 4, head_width = 70, hidden = 150, grid = 60, blocks = 3;
};

inline Floats random_floats(Random& random, int64_t count, double mean, double deviation) {
  Floats values(count);
  for (float& value : values) value = float(mean + deviation * random.normal());
  return values;
}

inline Norm random_norm(Random& random, int64_t in) {
  return {random.pick({1e-6f, 1e-5f, 1e-3f}), random_floats(random, in, 1, 0.3),
          random_floats(random, in, 0, 0.3)};
}

inline Linear random_linear(Random& random, int64_t in, int64_t out, vitslim::DType dtype,
                            bool biased = true) {
  Linear linear{in, out, random_floats(random, in * out, 0, 1 / std::sqrt(in + 1.0)),
                random_floats(random, biased ? out : 0, 0, 0.3)};
  if (dtype == vitslim::DType::BFLOAT16)
    for (float& weight : linear.weight) weight = rounded_to_bfloat16(weight);
  return linear;
}

// Some of 0..tokens, in order, at least one.
inline std::vector<int64_t> random_rows(Random& random, int64_t tokens) {
  std::vector<int64_t> rows;
  const double share = random.uniform();
  for (int64_t row = 0; row < tokens; ++row)
    if (random.chance(share)) rows.push_back(row);
  if (rows.empty()) rows.push_back(random.between(0, tokens - 1));
  return rows;
}

inline Floats random_layer_scale(Random& random, int64_t embed_dim) {
  if (random.chance(0.5)) return Floats(embed_dim, random.pick({1.0f, 1e-5f}));
  return random_floats(random, embed_dim, 0, 1);
}

inline Block random_block(Random& random, const Limits& limits, int64_t embed_dim, int64_t tokens,
                          vitslim::DType dtype) {
  Block block;
  for (int64_t left = random.between(1, limits.heads); left > 0; --left)
    block.heads.push_back(random.chance(0.15) ? random.between(0, 1)
                                              : random.size(0, limits.head_width));
  const int64_t all = std::accumulate(block.heads.begin(), block.heads.end(), int64_t(0));
  const int64_t hidden = random.chance(0.1) ? random.between(0, 1) : random.size(0, limits.hidden);
  block.activation = random.between(0, vitslim::ACTIVATION_COUNT - 1);
  block.selects = random.chance(0.3);
  if (block.selects) block.kept = random_rows(random, tokens);
  block.tokens = block.selects ? int64_t(block.kept.size()) : tokens;
  block.softmax_scale = float(random.chance(0.1) ? random.symmetric() : random.uniform());
  block.norm1 = random_norm(random, embed_dim);
  block.norm2 = random_norm(random, embed_dim);
  block.qkv = random_linear(random, embed_dim, 3 * all, dtype);
  block.proj = random_linear(random, all, embed_dim, dtype);
  block.fc1 = random_linear(random, embed_dim, hidden, dtype);
  block.fc2 = random_linear(random, hidden, embed_dim, dtype);
  block.ls1 = random_layer_scale(random, embed_dim);
  block.ls2 = random_layer_scale(random, embed_dim);
  if (random.chance(0.3)) block.gate = random_floats(random, block.tokens, 0.5, 0.5);
  return block;
}

inline Model random_model(Random& random, const Limits& limits = {}) {
  Model model;
  model.dtype = random.pick({vitslim::DType::FLOAT32, vitslim::DType::BFLOAT16});
  model.bfloat16_products = model.dtype == vitslim::DType::BFLOAT16 && random.chance(0.5);
  model.in_chans = random.between(1, 4);
  model.patch_height = random.size(1, 9);
  model.patch_width = random.size(1, 9);
  model.embed_dim = random.size(1, limits.embed_dim);
  model.grid_height = random.size(1, limits.grid);
  model.grid_width = random.size(1, std::max<int64_t>(1, limits.grid / model.grid_height));
  model.prefix = random.between(0, 3);
  model.has_pre_norm = random.chance(0.3);
  model.has_final_norm = random.chance(0.7);
  model.pre_norm = random_norm(random, model.embed_dim);
  model.final_norm = random_norm(random, model.embed_dim);
  const int64_t depth = model.in_chans * model.patch_height * model.patch_width;
  model.patches = random_linear(random, depth, model.embed_dim, model.dtype, false);
  model.start = random_floats(random, model.tokens() * model.embed_dim, 0, 1);
  int64_t tokens = model.tokens();
  for (int64_t left = random.chance(0.05) ? 0 : random.between(1, limits.blocks); left > 0;
       --left) {
    model.blocks.push_back(random_block(random, limits, model.embed_dim, tokens, model.dtype));
    tokens = model.blocks.back().tokens;
  }
  model.rows = random.chance(0.3) ? 1 : random.chance(0.5) ? tokens : random.between(1, tokens);
  return model;
}

// Everything that a reader of a failure wants to know.
inline std::string describe(const Model& model) {
  std::ostringstream text;
  text << (model.dtype == vitslim::DType::FLOAT32 ? "float32"
           : model.bfloat16_products              ? "bfloat16 products"
                                                  : "bfloat16")
       << ", image " << model.in_chans << " x " << model.height() << " x " << model.width()
       << ", patch " << model.patch_height << " x " << model.patch_width << ", embed_dim "
       << model.embed_dim << ", prefix " << model.prefix << ", tokens " << model.tokens()
       << ", pre_norm " << model.has_pre_norm << ", final_norm " << model.has_final_norm
       << ", rows " << model.rows;
  for (const Block& block : model.blocks) {
    text << "; block: heads";
    for (const int64_t width : block.heads) text << " " << width;
    text << ", hidden " << block.fc1.out << ", activation " << block.activation << ", tokens "
         << block.tokens << (block.selects ? " (selected)" : "") << ", gated "
         << !block.gate.empty() << ", softmax scale " << block.softmax_scale;
  }
  return text.str();
}

}  // namespace stress
