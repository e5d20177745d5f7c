// Chooses the kernel of the attention's backward and starts it.

#include "ragged_attention_backward_resident.cuh"
#include "ragged_attention_backward_streaming.cuh"

namespace vitslim {

// In files of their own, which are compiled beside each other.
void ragged_attention_backward_float16_cuda(const RaggedAttentionBackward& call, bool resident,
                                            const Gpu& gpu);
void ragged_attention_backward_bfloat16_cuda(const RaggedAttentionBackward& call, bool resident,
                                             const Gpu& gpu);
void ragged_attention_backward_2_parts_cuda(const RaggedAttentionBackward& call, const Gpu& gpu);
void ragged_attention_backward_3_parts_cuda(const RaggedAttentionBackward& call, const Gpu& gpu);

namespace {

// Whether a head's keys stay in one block. Asks nothing that only one of the two entries knows.
bool stays_resident(const RaggedAttentionShape& shape) {
  if (shape.dtype == DType::FLOAT32 || shape.tokens > RESIDENT_TOKENS) return false;
  int64_t widest = 0;
  for (int64_t h = 0; h < shape.heads; ++h)
    widest = std::max(widest, shape.head_offsets[h + 1] - shape.head_offsets[h]);
  return widest <= RESIDENT_WIDTH &&
         resident_bytes(int(widest), int(shape.tokens)) <= current_device().shared_memory;
}

}  // namespace

int64_t ragged_attention_grad_mask_rows_cuda(const RaggedAttentionShape& shape, const Gpu&) {
  if (shape.batch == 0 || shape.tokens == 0) return 0;
  return stays_resident(shape) ? shape.batch : shape.batch * streaming_blocks(shape.tokens);
}

void ragged_attention_backward_cuda(const RaggedAttentionBackward& call, const Gpu& gpu) {
  if (call.shape.batch == 0 || call.shape.tokens == 0) return;
  switch (call.shape.dtype) {
    case DType::FLOAT16:
      return ragged_attention_backward_float16_cuda(call, stays_resident(call.shape), gpu);
    case DType::BFLOAT16:
      return ragged_attention_backward_bfloat16_cuda(call, stays_resident(call.shape), gpu);
    case DType::FLOAT32:
      return gpu.float32_parts == 2 ? ragged_attention_backward_2_parts_cuda(call, gpu)
                                    : ragged_attention_backward_3_parts_cuda(call, gpu);
  }
}

}  // namespace vitslim
