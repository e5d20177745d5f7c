// The kernels of ragged attention, compiled for AVX2.

#if defined(__x86_64__)
#define VITSLIM_TARGET_AVX2
#include "ragged_attention_kernels.h"
#include "targets.h"
// Behind targets.h, which decides what they become.
#include "ragged_attention_backward.h"
#include "ragged_attention_forward.h"

namespace vitslim {

const RaggedAttentionKernels ragged_attention_avx2 = {forward_scratch, backward_scratch,
                                                      forward_head, backward_head};

}  // namespace vitslim

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
