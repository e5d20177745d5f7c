// The steps of the encoder on one image, for the members of a team.
//
// Every member owns a range of rows and keeps them in its cache. Members meet once a block, when
// the keys and values of all rows are there, and where rows leave. What one member still reads is
// never what another writes: x and qkv have two places that are used in turn.

#pragma once

#include <algorithm>
#include <cstring>

#include "packed_linear_kernels.h"
#include "ragged_attention_kernels.h"
#include "scratch.h"
#include "split.h"
#include "team.h"
#include "vit_encoder_layout.h"

namespace vitslim {
namespace {

// Floats of the left operands and hidden units that a member works on at a time: they and a few
// panels of weights fit into a second-level cache of 1 MiB.
constexpr int64_t BLOCK_FLOATS = 160 * 1024;
// Hidden units between fc1 and fc2, so that each weight is read once for all rows of a block.
constexpr int64_t HIDDEN_BLOCK = 512;
constexpr int64_t LEAST_ROWS = 48;
// An odd number of cache lines, so that rows do not meet in the same sets of a cache.
int64_t line_stride(int64_t width) { return ((width + 15) / 16 | 1) * 16; }

struct Range {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// What a team shares while it works on an image.
struct Shared {
  float* x[2];    // [tokens, x_stride]
  float* qkv[2];  // [tokens, qkv_stride]
  float* out;     // [tokens, attn_dim], of the attention
};

// What a member has for itself.
struct Own {
  float* block;      // [floats of a block]: left operand, then hidden units
  float* product;    // scratch of products
  float* attention;  // scratch of attention
};

class Encoder {
 public:
  Encoder(const VitEncoder& call, const EncoderLayout& layout)
      : call_(call),
        layout_(layout),
        linear_(packed_linear_kernels()),
        attention_(ragged_attention_kernels()),
        width_(call.embed_dim),
        x_stride_(line_stride(width_)),
        qkv_stride_(line_stride(3 * layout.widest_attention)),
        hidden_stride_(line_stride(std::min(layout.most_hidden, HIDDEN_BLOCK))),
        patch_stride_(line_stride(layout.patches.in)),
        selects_(std::any_of(layout.blocks.begin(), layout.blocks.end(),
                             [](const EncoderBlock& block) { return block.rows != nullptr; })),
        block_floats_(block_floats()) {}

  void carve(Shared* shared, int64_t members, Carver& carver) const {
    shared->x[0] = carver.take(call_.tokens * x_stride_);
    shared->x[1] = selects_ ? carver.take(call_.tokens * x_stride_) : shared->x[0];
    shared->qkv[0] = carver.take(call_.tokens * qkv_stride_);
    // Alone, a member is done with the keys of a block before it writes those of the next.
    shared->qkv[1] = members > 1 ? carver.take(call_.tokens * qkv_stride_) : shared->qkv[0];
    shared->out = carver.take(call_.tokens * layout_.widest_attention);
  }

  void carve(Own* own, Carver& carver) const {
    own->block = carver.take(block_floats_);
    int64_t product = scratch(layout_.patches, patch_stride_);
    int64_t attention = 0;
    for (const EncoderBlock& block : layout_.blocks) {
      product = std::max({product, scratch(block.qkv, x_stride_), scratch(block.proj, 1),
                          scratch(block.fc1, x_stride_ + hidden_stride_),
                          scratch(block.fc2, x_stride_ + hidden_stride_)});
      const RaggedAttentionShape shape = attention_shape(block);
      for (int64_t head = 0; head < block.heads; ++head)
        attention = std::max(attention, attention_.forward_scratch(shape, head));
    }
    own->product = carver.take(product);
    own->attention = carver.take(attention);
  }

  // One image, worked on by the members of `here` out of a team of `members`.
  void run(int64_t image, Range here, int64_t members, const Shared& shared, const Own& own,
           Barrier& barrier) const {
    const auto meet = [&] {
      if (here.count() < members) barrier.arrive(here.count(), members);
    };
    // The rows that the members of `here` own are one range.
    const auto mine = [&](int64_t rows) {
      return Range{here.begin * rows / members, here.end * rows / members};
    };
    int place = 0;
    embed(image, mine(call_.tokens), shared.x[place], own);
    const int64_t depth = int64_t(layout_.blocks.size());
    for (int64_t i = 0; i < depth; ++i) {
      const EncoderBlock& block = layout_.blocks[i];
      if (block.rows) {
        meet();
        select(block, mine(block.tokens), shared.x[place], shared.x[1 - place]);
        place = 1 - place;
      }
      float* x = shared.x[place];
      float* qkv = shared.qkv[i % 2];
      const int64_t wanted = i + 1 < depth ? block.tokens : call_.rows;
      project(block, mine(block.tokens), wanted, x, qkv, own);
      meet();
      attend(block, mine(wanted), qkv, x, shared.out, own);
      transform(block, i + 1 < depth ? &block + 1 : nullptr, mine(wanted), x, own);
    }
    // The owner of a row below `rows` is the same as in the last block.
    finish(image, mine(depth ? call_.rows : call_.tokens), shared.x[place]);
  }

 private:
  int64_t block_floats() const {
    const int64_t row = std::max(x_stride_ + hidden_stride_, patch_stride_);
    return std::min(std::max(BLOCK_FLOATS, LEAST_ROWS * row), call_.tokens * row);
  }

  // How many rows a member takes at a time when each needs so many floats of its block.
  int64_t rows_of(int64_t floats) const { return std::max<int64_t>(1, block_floats_ / floats); }

  // Of products of that many rows.
  int64_t scratch(const PackedWeight& weight, int64_t floats) const {
    return linear_.scratch(std::min(rows_of(floats), call_.tokens), weight.in, weight.dtype,
                           weight.bfloat16_products);
  }

  RaggedAttentionShape attention_shape(const EncoderBlock& block) const {
    return {1,           block.tokens,   block.heads, block.head_offsets,
            block.scale, DType::FLOAT32, 0,           qkv_stride_};
  }

  // A product of all columns and the whole depth, to which more may be set.
  static Product product(const float* x, int64_t rows, int64_t x_stride, const PackedWeight& weight,
                         const float* bias, float* y, int64_t y_stride) {
    Product p{};
    p.x = x;
    p.rows = rows;
    p.x_stride = x_stride;
    p.weight = weight;
    p.panel_end = (weight.out + PANEL - 1) / PANEL;
    p.depth_end = weight.in;
    p.bias = bias;
    p.y = y;
    p.y_stride = y_stride;
    return p;
  }

  // The panels that a product takes first.
  static Upcoming beginning(const PackedWeight& weight, int64_t panel = 0, int64_t depth = 0) {
    const int64_t panels = (weight.out + PANEL - 1) / PANEL - panel;
    return upcoming(weight, panel, std::min<int64_t>(panels, 4), depth);
  }

  // y += scale * (x W^T + bias)
  static Product adding(Product p, const float* scale) {
    p.residual = p.y;
    p.residual_stride = p.y_stride;
    p.scale = scale;
    return p;
  }

  // x = start + patches W^T, and the norm before the first block.
  void embed(int64_t image, Range rows, float* x, const Own& own) const {
    for (int64_t row = rows.begin; row < std::min(rows.end, layout_.prefix); ++row)
      std::memcpy(x + row * x_stride_, call_.start + row * width_, width_ * sizeof(float));
    const int64_t first = std::max(rows.begin, layout_.prefix);
    const Split chunks(std::max<int64_t>(0, rows.end - first), rows_of(patch_stride_));
    for (int64_t i = 0; i < chunks.pieces; ++i) {
      const int64_t begin = first + chunks.begin(i), count = chunks.begin(i + 1) - chunks.begin(i);
      for (int64_t row = 0; row < count; ++row)
        read_patch(image, begin + row - layout_.prefix, own.block + row * patch_stride_);
      Product p = product(own.block, count, patch_stride_, layout_.patches, nullptr,
                          x + begin * x_stride_, x_stride_);
      p.residual = call_.start + begin * width_;
      p.residual_stride = width_;
      if (i + 1 < chunks.pieces) {
        p.after = beginning(layout_.patches);
      } else if (!layout_.blocks.empty()) {
        p.after = beginning(layout_.blocks[0].qkv);
      }
      linear_.multiply(p, own.product);
    }
    float* mine = x + rows.begin * x_stride_;
    if (layout_.has_pre_norm)
      linear_.normalise(mine, x_stride_, rows.count(), width_, layout_.pre_norm, nullptr, mine,
                        x_stride_);
  }

  // The numbers of a patch, as the weight of a convolution has them: channels, rows, columns.
  void read_patch(int64_t image, int64_t patch, float* to) const {
    const int64_t columns = call_.width / layout_.patch_width;
    const int64_t top = patch / columns * layout_.patch_height;
    const int64_t left = patch % columns * layout_.patch_width;
    for (int64_t channel = 0; channel < call_.in_chans; ++channel) {
      for (int64_t i = 0; i < layout_.patch_height; ++i) {
        const int64_t line = (image * call_.in_chans + channel) * call_.height + top + i;
        std::memcpy(to, call_.images + line * call_.width + left,
                    layout_.patch_width * sizeof(float));
        to += layout_.patch_width;
      }
    }
  }

  void select(const EncoderBlock& block, Range rows, const float* from, float* to) const {
    for (int64_t row = rows.begin; row < rows.end; ++row)
      std::memcpy(to + row * x_stride_, from + block.rows[row] * x_stride_, width_ * sizeof(float));
  }

  // qkv of the range; queries of rows that nobody wants are left out.
  void project(const EncoderBlock& block, Range rows, int64_t wanted, const float* x, float* qkv,
               const Own& own) const {
    const Split chunks(rows.count(), rows_of(x_stride_));
    for (int64_t i = 0; i < chunks.pieces; ++i) {
      const int64_t begin = rows.begin + chunks.begin(i), end = rows.begin + chunks.begin(i + 1);
      linear_.normalise(x + begin * x_stride_, x_stride_, end - begin, width_, block.norm1,
                        block.gate ? block.gate + begin : nullptr, own.block, x_stride_);
      const int64_t with_queries = std::clamp(wanted - begin, int64_t(0), end - begin);
      Product p = product(own.block, end - begin, x_stride_, block.qkv, block.qkv_bias,
                          qkv + begin * qkv_stride_, qkv_stride_);
      p.after = beginning(i + 1 < chunks.pieces ? block.qkv : block.proj);
      if (with_queries < p.rows) {
        Product queries = p;
        queries.rows = with_queries;
        queries.panel_end = (block.attn_dim + PANEL - 1) / PANEL;
        linear_.multiply(queries, own.product);
        p.panel_begin = block.attn_dim / PANEL;
      }
      linear_.multiply(p, own.product);
    }
  }

  // x += ls1 * proj(attention)
  void attend(const EncoderBlock& block, Range rows, const float* qkv, float* x, float* out,
              const Own& own) const {
    if (rows.count() == 0) return;
    const RaggedAttentionForward call{attention_shape(block), qkv, nullptr, out, nullptr};
    for (int64_t head = 0; head < block.heads; ++head)
      if (block.head_offsets[head + 1] > block.head_offsets[head])
        attention_.forward(call, 0, head, rows.begin, rows.end, own.attention);
    Product p = adding(product(out + rows.begin * block.attn_dim, rows.count(), block.attn_dim,
                               block.proj, block.proj_bias, x + rows.begin * x_stride_, x_stride_),
                       block.ls1);
    p.after = beginning(block.fc1);
    linear_.multiply(p, own.product);
  }

  // x += ls2 * fc2(f(fc1(norm2(x)))); then comes the block `next`, if any.
  void transform(const EncoderBlock& block, const EncoderBlock* next, Range rows, float* x,
                 const Own& own) const {
    const Split chunks(rows.count(), rows_of(x_stride_ + hidden_stride_));
    for (int64_t i = 0; i < chunks.pieces; ++i) {
      const int64_t begin = rows.begin + chunks.begin(i);
      const int64_t count = rows.begin + chunks.begin(i + 1) - begin;
      float* left = own.block;
      float* hidden = own.block + count * x_stride_;
      float* to = x + begin * x_stride_;
      linear_.normalise(to, x_stride_, count, width_, block.norm2,
                        block.gate ? block.gate + begin : nullptr, left, x_stride_);
      // Without a hidden unit there is still fc2's bias.
      const int64_t blocks = std::max<int64_t>(1, (block.hidden + HIDDEN_BLOCK - 1) / HIDDEN_BLOCK);
      const Split panels((block.hidden + PANEL - 1) / PANEL, HIDDEN_BLOCK / PANEL);
      for (int64_t j = 0; j < blocks; ++j) {
        Product up =
            product(left, count, x_stride_, block.fc1, block.fc1_bias, hidden, hidden_stride_);
        up.panel_begin = panels.pieces ? panels.begin(j) : 0;
        up.panel_end = panels.pieces ? panels.begin(j + 1) : 0;
        up.activation = block.activation;
        // A product writes its columns where y has them; here y begins with the first of them.
        const int64_t unit = up.panel_begin * PANEL;
        up.y -= unit;
        up.after = beginning(block.fc2, 0, unit);
        linear_.multiply(up, own.product);
        Product down = adding(product(hidden, count, hidden_stride_, block.fc2,
                                      j == 0 ? block.fc2_bias : nullptr, to, x_stride_),
                              block.ls2);
        down.depth_begin = unit;
        down.depth_end = std::min(block.hidden, up.panel_end * PANEL);
        if (j + 1 < blocks) {
          down.after = beginning(block.fc1, up.panel_end);
        } else if (i + 1 < chunks.pieces) {
          down.after = beginning(block.fc1);
        } else if (next) {
          down.after = beginning(next->qkv);
        }
        linear_.multiply(down, own.product);
      }
    }
  }

  void finish(int64_t image, Range rows, const float* x) const {
    rows.end = std::min(rows.end, call_.rows);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float* to = call_.out + (image * call_.rows + row) * width_;
      if (layout_.has_final_norm)
        linear_.normalise(x + row * x_stride_, x_stride_, 1, width_, layout_.final_norm, nullptr,
                          to, width_);
      else
        std::memcpy(to, x + row * x_stride_, width_ * sizeof(float));
    }
  }

  const VitEncoder& call_;
  const EncoderLayout& layout_;
  const PackedLinearKernels& linear_;
  const RaggedAttentionKernels& attention_;
  const int64_t width_, x_stride_, qkv_stride_, hidden_stride_, patch_stride_;
  const bool selects_;
  const int64_t block_floats_;
};

}  // namespace
}  // namespace vitslim
