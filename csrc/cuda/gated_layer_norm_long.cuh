// Layer norm of rows that are too long for registers: a block has a row and reads it again for
// every sum, out of the cache where it fits there. Any alignment.

#pragma once

#include "gated_layer_norm.cuh"

namespace vitslim {

constexpr int LONG_THREADS = 256;

// Each sum over the threads of the block.
template <int COUNT>
__device__ inline void sum_over_block(float (&sums)[COUNT], float* exchange) {
  sum_over_lanes(sums, LONG_THREADS, exchange);
  // The exchange is free again.
  __syncthreads();
}

template <typename E, typename W>
__global__ void __launch_bounds__(LONG_THREADS, 4)
    gated_layer_norm_long_forward_kernel(const GatedNorm<E, W> norm, float eps,
                                         E* out,         // [rows, channels]
                                         float* mean,    // [rows]
                                         float* rstd) {  // [rows]
  float* exchange = reinterpret_cast<float*>(shared_memory());
  const int row = int(blockIdx.x), thread = int(threadIdx.x);
  const E* x = norm.row_of(norm.x, row);
  float sum[1] = {}, squares[1] = {};
  for (int c = thread; c < norm.channels; c += LONG_THREADS) sum[0] += to_float(x[c]);
  sum_over_block(sum, exchange);
  const float row_mean = sum[0] / float(norm.channels);
  for (int c = thread; c < norm.channels; c += LONG_THREADS) {
    const float centred = to_float(x[c]) - row_mean;
    squares[0] += centred * centred;
  }
  sum_over_block(squares, exchange);
  const float row_rstd = reciprocal_root(squares[0] / float(norm.channels) + eps);
  if (thread == 0) {
    mean[row] = row_mean;
    rstd[row] = row_rstd;
  }
  const float gate = norm.gate_of(row);
  E* to = out + int64_t(row) * norm.channels;
  for (int c = thread; c < norm.channels; c += LONG_THREADS) {
    const float n = (to_float(x[c]) - row_mean) * row_rstd;
    to[c] = from_float<E>((n * to_float(norm.weight[c]) + to_float(norm.bias[c])) * gate);
  }
}

// grad_x and grad_gate.
template <typename E, typename W>
__global__ void __launch_bounds__(LONG_THREADS, 4)
    gated_layer_norm_long_backward_kernel(const GatedNorm<E, W> norm,
                                          const GatedNormGradients<E> gradients) {
  float* exchange = reinterpret_cast<float*>(shared_memory());
  const int row = int(blockIdx.x), thread = int(threadIdx.x);
  const E* x = norm.row_of(norm.x, row);
  const E* g = norm.row_of(gradients.grad_out, row);
  const float mean = gradients.mean[row], rstd = gradients.rstd[row];
  float sums[3] = {};  // of G w, G w n and G b
  for (int c = thread; c < norm.channels; c += LONG_THREADS) {
    const float grad = to_float(g[c]), weighted = grad * to_float(norm.weight[c]);
    sums[0] += weighted;
    sums[1] += weighted * ((to_float(x[c]) - mean) * rstd);
    sums[2] += grad * to_float(norm.bias[c]);
  }
  sum_over_block(sums, exchange);
  if (gradients.grad_gate && thread == 0) gradients.grad_gate[row] = sums[1] + sums[2];
  const float factor = rstd * norm.gate_of(row), share = 1.0f / float(norm.channels);
  E* to = gradients.grad_x + int64_t(row) * norm.channels;
  for (int c = thread; c < norm.channels; c += LONG_THREADS) {
    const float n = (to_float(x[c]) - mean) * rstd;
    const float weighted = to_float(g[c]) * to_float(norm.weight[c]);
    to[c] = from_float<E>(factor * (weighted - sums[0] * share - n * (sums[1] * share)));
  }
}

// grad_affine: a thread has a column of every row_blocks-th row.
template <typename E, typename W>
__global__ void __launch_bounds__(LONG_THREADS, 4)
    gated_layer_norm_long_affine_kernel(const GatedNorm<E, W> norm,
                                        const GatedNormGradients<E> gradients, int row_blocks) {
  const int row_block = int(blockIdx.x) % row_blocks;
  const int column = int(blockIdx.x) / row_blocks * LONG_THREADS + int(threadIdx.x);
  if (column >= norm.channels) return;
  float weight_sum = 0, bias_sum = 0;
#pragma unroll 4
  for (int row = row_block; row < norm.rows; row += row_blocks) {
    const float x = to_float(norm.row_of(norm.x, row)[column]);
    const float gated = to_float(norm.row_of(gradients.grad_out, row)[column]) * norm.gate_of(row);
    weight_sum += gated * ((x - gradients.mean[row]) * gradients.rstd[row]);
    bias_sum += gated;
  }
  float* to = gradients.grad_affine + int64_t(row_block) * 2 * norm.channels + column;
  to[0] = weight_sum;
  to[norm.channels] = bias_sum;
}

}  // namespace vitslim
