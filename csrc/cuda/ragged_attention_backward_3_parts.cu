// The attention's backward in float32 that is the sum of 3 bfloat16 numbers.

#include "ragged_attention_backward_streaming.cuh"

namespace vitslim {

void ragged_attention_backward_3_parts_cuda(const RaggedAttentionBackward& call, const Gpu& gpu) {
  launch_streaming<float, 3>(call, gpu);
}

}  // namespace vitslim
