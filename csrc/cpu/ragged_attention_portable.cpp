// The kernels of ragged attention, compiled for the compiler's default target.

#include "ragged_attention_kernels.h"
// Behind targets.h, which decides what they become.
#include "ragged_attention_backward.h"
#include "ragged_attention_forward.h"

namespace vitslim {

const RaggedAttentionKernels ragged_attention_portable = {forward_scratch, backward_scratch,
                                                          forward_head, backward_head};

}  // namespace vitslim
