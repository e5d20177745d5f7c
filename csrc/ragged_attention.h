// Attention over heads that each have a width of their own, read from one packed projection.
//
// With q, k, v the columns of one head, z its part of the mask (all ones without one):
//   S = scale * (q z)(k z)^T,   P = softmax(S),   out = P (v z),   lse = log(sum(exp(S)))
// Plain C++: no torch here, so that the kernels build in seconds and against any torch.

#pragma once

#include <cstdint>

#include "dtype.h"
#include "gpu.h"
#include "threads.h"

namespace vitslim {

// What forward and backward share. D = head_offsets[heads] is the number of columns of q.
struct RaggedAttentionShape {
  int64_t batch, tokens, heads;
  const int64_t* head_offsets;  // [heads + 1], head h owns the columns head_offsets[h]..[h + 1]
  float scale;
  DType dtype;               // of qkv, out and their gradients
  int64_t qkv_batch_stride;  // in elements, as all strides
  int64_t qkv_token_stride;  // columns lie side by side
};

struct RaggedAttentionForward {
  RaggedAttentionShape shape;
  const void* qkv;    // [batch, tokens, 3 * D]: all heads of q, then of k, then of v
  const float* mask;  // [D], or null
  void* out;          // [batch, tokens, D], contiguous
  float* lse;         // [batch, heads, tokens], contiguous, or null
};

struct RaggedAttentionBackward {
  RaggedAttentionShape shape;
  const void* grad_out;  // [batch, tokens, D]
  int64_t grad_out_batch_stride, grad_out_token_stride;
  const void* qkv;    // [batch, tokens, 3 * D]
  const void* out;    // [batch, tokens, D], contiguous
  const float* lse;   // [batch, heads, tokens], contiguous
  const float* mask;  // [D], or null
  void* grad_qkv;     // [batch, tokens, 3 * D], contiguous
  // [rows, D], for the caller to add up in order; null if mask is. On the CPU a row is an image.
  float* grad_mask;
  float* delta;  // [batch, heads, tokens], scratch of the CUDA kernels; null on the CPU
};

void ragged_attention_forward_cpu(const RaggedAttentionForward& call, const Threads& threads);
void ragged_attention_backward_cpu(const RaggedAttentionBackward& call, const Threads& threads);

// Heads may be up to CUDA_HEAD_WIDTH wide. Throws std::runtime_error, in one sentence.
constexpr int64_t CUDA_HEAD_WIDTH = 128;
void ragged_attention_forward_cuda(const RaggedAttentionForward& call, const Gpu& gpu);
void ragged_attention_backward_cuda(const RaggedAttentionBackward& call, const Gpu& gpu);
// How many rows the latter writes of grad_mask.
int64_t ragged_attention_grad_mask_rows_cuda(const RaggedAttentionShape& shape, const Gpu& gpu);

}  // namespace vitslim
