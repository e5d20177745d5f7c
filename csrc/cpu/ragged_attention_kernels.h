// What each target's unit offers to ragged_attention.cpp, which shares out the work.

#pragma once

#include "../ragged_attention.h"

namespace vitslim {

struct RaggedAttentionKernels {
  // Floats of scratch memory that one head needs.
  int64_t (*forward_scratch)(const RaggedAttentionShape& shape, int64_t head);
  int64_t (*backward_scratch)(const RaggedAttentionShape& shape, int64_t head);
  // Queries begin..end of one head of one image.
  void (*forward)(const RaggedAttentionForward& call, int64_t image, int64_t head, int64_t begin,
                  int64_t end, float* scratch);
  // One head of one image.
  void (*backward)(const RaggedAttentionBackward& call, int64_t image, int64_t head,
                   float* scratch);
};

#if defined(__x86_64__)
extern const RaggedAttentionKernels ragged_attention_avx512;
extern const RaggedAttentionKernels ragged_attention_avx2;
#endif
extern const RaggedAttentionKernels ragged_attention_portable;

// Those of the instruction set in use.
const RaggedAttentionKernels& ragged_attention_kernels();

}  // namespace vitslim
