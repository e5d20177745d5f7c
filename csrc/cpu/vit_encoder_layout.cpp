#include "vit_encoder_layout.h"

#include <algorithm>
#include <sstream>
#include <stdexcept>

namespace vitslim {
namespace {

// No model has a size beyond this, and products of two such sizes and a small factor fit into
// 64 bits.
constexpr int64_t LARGEST = int64_t(1) << 28;

// Throws the parts as one sentence where a condition fails; nothing is put together where it holds.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream sentence;
  sentence << "vit_encoder: ";
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// Takes the numbers of `layout` one after the other.
class Numbers {
 public:
  Numbers(const int64_t* data, int64_t count) : next_(data), left_(count) {}

  const int64_t* take(int64_t count) {
    require(count <= left_, "layout ends too early; pack the model again.");
    const int64_t* taken = next_;
    next_ += count;
    left_ -= count;
    return taken;
  }
  int64_t take(const char* what, int64_t least, int64_t most) {
    const int64_t number = *take(1);
    require(number >= least && number <= most, "layout gives ", what, " as ", number,
            "; pack the model again.");
    return number;
  }
  int64_t left() const { return left_; }

 private:
  const int64_t* next_;
  int64_t left_;
};

// Takes pieces of `vectors`, each of which begins at a multiple of 16.
class Vectors {
 public:
  Vectors(const float* data, int64_t count) : next_(data), left_(count) {}

  const float* take(int64_t count) {
    const int64_t filled = (count + PANEL - 1) / PANEL * PANEL;
    require(filled <= left_, "vectors has too few elements for layout; pack the model again.");
    const float* taken = next_;
    next_ += filled;
    left_ -= filled;
    return taken;
  }
  LayerNorm norm(int64_t width, float eps) {
    const float* weight = take(width);
    return {weight, take(width), eps};
  }
  int64_t left() const { return left_; }

 private:
  const float* next_;
  int64_t left_;
};

// Takes the weights out of `panels`.
class Panels {
 public:
  explicit Panels(const VitEncoder& call) : call_(call) {}

  PackedWeight take(int64_t in, int64_t out) {
    // The check of each factor keeps the product within 64 bits.
    require(in <= 4 * LARGEST && out <= 4 * LARGEST, "a weight is too large.");
    const int64_t count = vitslim::panel_elements(in, out, call_.dtype);
    require(count <= call_.panel_elements - used_,
            "panels has too few elements for layout; pack the model again.");
    const int64_t bytes = call_.dtype == DType::FLOAT32 ? 4 : 2;
    const void* data = static_cast<const char*>(call_.panels) + used_ * bytes;
    used_ += count;
    return {data, call_.dtype, call_.bfloat16_products, in, out};
  }
  int64_t left() const { return call_.panel_elements - used_; }

 private:
  const VitEncoder& call_;
  int64_t used_ = 0;
};

}  // namespace

void EncoderLayout::read(const VitEncoder& call) {
  Numbers numbers(call.layout, call.layout_elements);
  Vectors floats(call.vectors, call.vector_elements);
  Panels weights(call);
  numbers.take("its version", 1, 1);
  const int64_t in_chans = numbers.take("in_chans", 1, LARGEST);
  require(in_chans == call.in_chans, "images have ", call.in_chans, " channels, the model takes ",
          in_chans, ".");
  patch_height = numbers.take("patch_height", 1, LARGEST);
  patch_width = numbers.take("patch_width", 1, LARGEST);
  const int64_t embed_dim = numbers.take("embed_dim", 1, LARGEST);
  require(embed_dim == call.embed_dim, "start has ", call.embed_dim, " columns, the model ",
          embed_dim, ".");
  prefix = numbers.take("prefix", 0, LARGEST);
  has_pre_norm = numbers.take("pre_norm", 0, 1);
  has_final_norm = numbers.take("final_norm", 0, 1);
  require(!call.bfloat16_products || call.dtype == DType::BFLOAT16,
          "bfloat16 products need bfloat16 panels.");
  const int64_t depth = numbers.take("the number of blocks", 0, numbers.left());

  require(call.height % patch_height == 0 && call.width % patch_width == 0, "images of ",
          call.height, "x", call.width, " pixels cannot be cut into patches of ", patch_height, "x",
          patch_width, ".");
  const int64_t patches_here = (call.height / patch_height) * (call.width / patch_width);
  require(prefix + patches_here == call.tokens, "images give ", patches_here, " patches after ",
          prefix, " prefix tokens, but start has ", call.tokens, " rows.");
  require(patch_height * patch_width <= LARGEST && in_chans * patch_height * patch_width <= LARGEST,
          "a patch is too large.");

  if (has_pre_norm) {
    const float eps = *floats.take(1);
    pre_norm = floats.norm(embed_dim, eps);
  }
  patches = weights.take(in_chans * patch_height * patch_width, embed_dim);

  blocks.clear();
  head_offsets.clear();
  widest_attention = most_hidden = 0;
  int64_t tokens = call.tokens;
  for (int64_t i = 0; i < depth; ++i) {
    EncoderBlock block{};
    block.heads = numbers.take("heads", 0, numbers.left());
    block.hidden = numbers.take("hidden", 0, LARGEST);
    block.activation = Activation(numbers.take("an activation", 0, ACTIVATION_COUNT - 1));
    const bool selects = numbers.take("selects", 0, 1);
    const bool gated = numbers.take("gated", 0, 1);
    const int64_t kept = numbers.take("kept", 0, tokens);
    const int64_t* widths = numbers.take(block.heads);
    int64_t offset = 0;
    head_offsets.push_back(0);
    for (int64_t h = 0; h < block.heads; ++h) {
      require(widths[h] >= 0 && widths[h] <= LARGEST, "layout gives a head the width ", widths[h],
              "; pack the model again.");
      offset += widths[h];
      require(offset <= LARGEST, "the heads of a block are too wide.");
      head_offsets.push_back(offset);
    }
    block.attn_dim = offset;
    if (selects) {
      block.rows = numbers.take(kept);
      for (int64_t r = 0; r < kept; ++r)
        require(block.rows[r] >= 0 && block.rows[r] < tokens, "layout keeps row ", block.rows[r],
                " of ", tokens, "; pack the model again.");
      tokens = kept;
    }
    block.tokens = tokens;

    const float* constants = floats.take(3);
    block.scale = constants[0];
    block.norm1 = floats.norm(embed_dim, constants[1]);
    block.qkv_bias = floats.take(3 * block.attn_dim);
    block.proj_bias = floats.take(embed_dim);
    block.ls1 = floats.take(embed_dim);
    block.norm2 = floats.norm(embed_dim, constants[2]);
    block.fc1_bias = floats.take(block.hidden);
    block.fc2_bias = floats.take(embed_dim);
    block.ls2 = floats.take(embed_dim);
    if (gated) block.gate = floats.take(tokens);
    block.qkv = weights.take(embed_dim, 3 * block.attn_dim);
    block.proj = weights.take(block.attn_dim, embed_dim);
    block.fc1 = weights.take(embed_dim, block.hidden);
    block.fc2 = weights.take(block.hidden, embed_dim);
    widest_attention = std::max(widest_attention, block.attn_dim);
    most_hidden = std::max(most_hidden, block.hidden);
    blocks.push_back(block);
  }
  // Only now the offsets have come to rest.
  const int64_t* offsets = head_offsets.data();
  for (EncoderBlock& block : blocks) {
    block.head_offsets = offsets;
    offsets += block.heads + 1;
  }
  if (has_final_norm) {
    const float eps = *floats.take(1);
    final_norm = floats.norm(embed_dim, eps);
  }
  require(numbers.left() == 0 && floats.left() == 0 && weights.left() == 0,
          "layout, vectors and panels do not belong together; pack the model again.");
  require(call.rows >= 0 && call.rows <= tokens, "rows is ", call.rows, ", but ", tokens,
          " tokens are left at the end.");
}

}  // namespace vitslim
