// Starts ragged_attention's forward: how the work is cut into blocks, and which kernel does it.

#include <algorithm>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "ragged_attention_forward.cuh"

namespace vitslim {
namespace {

constexpr int64_t RESIDENT_TOKENS = 256;
constexpr int64_t RING_SLOTS = 2;  // a power of two
// Bytes of qkv and out that stay in the second-level cache of an A100, 40 MB, beside what goes by.
constexpr int64_t CACHED_BYTES = 16 << 20;

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Cut {
  ForwardPlan plan;
  int warps;
  int64_t shared_memory;  // bytes
};

// `tile` is the number of keys of a tile, `row_bytes` a row of the widest head in shared memory.
Cut cut(const RaggedAttentionShape& shape, int64_t heads, int64_t tile, int64_t row_bytes,
        int64_t image_bytes, const Device& device) {
  const int64_t stripes = divided_up(shape.tokens, STRIPE);
  const int64_t tiles = divided_up(shape.tokens, tile);
  // With few heads and images, their stripes are spread until every multiprocessor has blocks. Two
  // stripes stay together: one warp alone would load all the keys.
  const int64_t wanted = 2 * device.processors / (shape.batch * heads);
  int64_t groups = std::clamp<int64_t>(wanted, 1, divided_up(stripes, 2));
  const auto warps_of = [&] {
    const int64_t group = divided_up(stripes, groups);
    return divided_up(group, divided_up(group, MOST_WARPS));
  };
  int64_t rows = stripes * STRIPE, last_slot = RESIDENT_TOKENS - 1, ahead = tiles;
  const auto bytes = [&] { return WORK_BYTES + (2 * rows + warps_of() * STRIPE) * row_bytes; };
  if (shape.tokens > RESIDENT_TOKENS || bytes() > device.shared_memory) {
    // Keys that have left shared memory cannot be read again: each warp has one stripe.
    groups = std::max(groups, divided_up(stripes, MOST_WARPS));
    rows = std::min(rows, RING_SLOTS * tile);
    last_slot = RING_SLOTS - 1;
    ahead = RING_SLOTS - 1;
    while (bytes() > device.shared_memory && groups < stripes) ++groups;
  }
  const int64_t group = divided_up(stripes, groups);
  const int64_t images = std::clamp<int64_t>(CACHED_BYTES / image_bytes, 1, shape.batch);
  return {{int(group), int(divided_up(stripes, group)), int(images), int(rows), int(last_slot),
           int(ahead)},
          int(warps_of()),
          bytes()};
}

template <typename E, int WIDEST, int PARTS>
void start(const RaggedAttentionForward& call, ForwardTask<E> task, const HeadTable& table,
           const Device& device, const Gpu& gpu) {
  const int64_t width = padded_width(table.heads[0].width);
  const int64_t image_bytes =
      std::max<int64_t>(1, 4 * int64_t(table.columns) * call.shape.tokens * int64_t(sizeof(E)));
  const Cut work =
      cut(call.shape, table.count, KEY_TILE<WIDEST, PARTS>, PARTS * width * 2, image_bytes, device);
  task.plan = work.plan;
  const Grid grid{call.shape.batch * table.count * work.plan.groups, work.warps * 32,
                  work.shared_memory};
  launch(
      "ragged_attention_forward_kernel", ragged_attention_forward_kernel<E, WIDEST, PARTS>, grid,
      gpu,
      [&](auto& sentence) {
        sentence << "batch " << call.shape.batch << ", tokens " << call.shape.tokens << ", heads "
                 << call.shape.heads << ", the widest " << table.heads[0].width;
      },
      task, table);
}

template <typename E, int PARTS>
void forward(const RaggedAttentionForward& call, const Gpu& gpu) {
  const RaggedAttentionShape& shape = call.shape;
  const int64_t columns = shape.head_offsets[shape.heads];
  const float scale = shape.scale;
  const float size = scale == 0.0f ? 1.0f : std::abs(scale);
  const ForwardTask<E> task{
      .qkv = static_cast<const E*>(call.qkv),
      .mask = call.mask,
      .out = static_cast<E*>(call.out),
      .lse = call.lse,
      .qkv_batch_stride = shape.qkv_batch_stride,
      .qkv_token_stride = shape.qkv_token_stride,
      .batch = int(shape.batch),
      .tokens = int(shape.tokens),
      .heads = int(shape.heads),
      .sign = float(scale > 0.0f) - float(scale < 0.0f),
      .exponent = size * 1.44269504088896f,
      .qkv_aligned =
          rows_aligned<E>(call.qkv, shape.qkv_batch_stride, shape.qkv_token_stride, columns),
      .out_aligned = rows_aligned<E>(call.out, shape.tokens * columns, columns, columns),
      .plan = {}};
  const Device device = current_device();
  for (const HeadTable& table : head_tables(shape)) {
    if (table.heads[0].width <= 64) {
      start<E, 64, PARTS>(call, task, table, device, gpu);
    } else {
      start<E, CUDA_HEAD_WIDTH, PARTS>(call, task, table, device, gpu);
    }
  }
}

}  // namespace

void ragged_attention_forward_cuda(const RaggedAttentionForward& call, const Gpu& gpu) {
  const RaggedAttentionShape& shape = call.shape;
  if (shape.batch == 0 || shape.tokens == 0 || shape.heads == 0) return;
  constexpr int64_t MOST_TOKENS = INT32_MAX - 64;
  if (shape.tokens > MOST_TOKENS)
    throw std::runtime_error("ragged_attention: " + std::to_string(shape.tokens) +
                             " tokens are more than the CUDA kernels count, " +
                             std::to_string(MOST_TOKENS) + ".");
  switch (shape.dtype) {
    case DType::BFLOAT16:
      return forward<BFloat16, 1>(call, gpu);
    case DType::FLOAT16:
      return forward<Half, 1>(call, gpu);
    case DType::FLOAT32:
      return gpu.float32_parts == 2 ? forward<float, 2>(call, gpu) : forward<float, 3>(call, gpu);
  }
}

}  // namespace vitslim
