// The attention's backward in bfloat16.

#include "ragged_attention_backward_resident.cuh"
#include "ragged_attention_backward_streaming.cuh"

namespace vitslim {

void ragged_attention_backward_bfloat16_cuda(const RaggedAttentionBackward& call, bool resident,
                                             const Gpu& gpu) {
  resident ? launch_resident<BFloat16>(call, gpu) : launch_streaming<BFloat16, 1>(call, gpu);
}

}  // namespace vitslim
