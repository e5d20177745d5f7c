// The attention's backward in float16.

#include "ragged_attention_backward_resident.cuh"
#include "ragged_attention_backward_streaming.cuh"

namespace vitslim {

void ragged_attention_backward_float16_cuda(const RaggedAttentionBackward& call, bool resident,
                                            const Gpu& gpu) {
  resident ? launch_resident<Half>(call, gpu) : launch_streaming<Half, 1>(call, gpu);
}

}  // namespace vitslim
