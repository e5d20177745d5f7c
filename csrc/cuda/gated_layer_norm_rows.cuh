// Layer norm of rows that fit into registers, each read once.
//
// 8 lanes or more hold a row, NUMBERS of it each (LaneColumns), so that a warp has up to four rows.
// The lanes exchange a row's sums by shuffles, and through shared memory where they are several
// warps.

#pragma once

#include "gated_layer_norm.cuh"

namespace vitslim {

// The most of a block, and so of a row.
constexpr int FORWARD_THREADS = 256, BACKWARD_THREADS = 128;

// How many of backward's blocks stay on a multiprocessor: what a lane holds of x, G and both sums
// is in registers. Fewer blocks of float32 have as many bytes under way.
constexpr int backward_blocks(int number_bytes, int numbers) {
  return (number_bytes == 2 ? 4 : 3) - (numbers > 16);
}

template <typename E, typename W, int NUMBERS, bool ALIGNED>
__global__ void __launch_bounds__(FORWARD_THREADS, 3)
    gated_layer_norm_forward_kernel(const GatedNorm<E, W> norm, float eps, int lanes,
                                    E* out,         // [rows, channels]
                                    float* mean,    // [rows]
                                    float* rstd) {  // [rows]
  constexpr int SIZE = VECTOR<E>, VECTORS = NUMBERS / SIZE;
  // [2, warps]
  float* exchange = reinterpret_cast<float*>(shared_memory());
  const int row = int(blockIdx.x) * (int(blockDim.x) / lanes) + int(threadIdx.x) / lanes;
  const bool exists = row < norm.rows;
  const LaneColumns<SIZE, ALIGNED> columns(int(threadIdx.x) % lanes, lanes, norm.channels);
  const E* from = exists ? norm.row_of(norm.x, row) : norm.x.first;
  Numbers<E, SIZE> x[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) columns.load(x[v], from, v, exists);

  float sum[1] = {};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v)
#pragma unroll
    for (int i = 0; i < SIZE; ++i) sum[0] += to_float(x[v].numbers[i]);
  sum_over_lanes(sum, lanes, exchange);
  const float row_mean = sum[0] / float(norm.channels);
  // The squares are taken of the centred row: E[x^2] - E[x]^2 would lose a small variance beside a
  // large mean.
  float squares[1] = {};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v)
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const float centred = to_float(x[v].numbers[i]) - row_mean;
      if (columns.has(v, i)) squares[0] += centred * centred;
    }
  sum_over_lanes(squares, lanes, exchange + blockDim.x / 32);
  const float row_rstd = reciprocal_root(squares[0] / float(norm.channels) + eps);
  if (!exists) return;
  if (int(threadIdx.x) % lanes == 0) {
    mean[row] = row_mean;
    rstd[row] = row_rstd;
  }
  const float gate = norm.gate_of(row);
  E* to = out + int64_t(row) * norm.channels;
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    Numbers<W, SIZE> weight, bias;
    columns.load(weight, norm.weight, v);
    columns.load(bias, norm.bias, v);
    float y[SIZE];
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const float n = (to_float(x[v].numbers[i]) - row_mean) * row_rstd;
      y[i] = (n * to_float(weight.numbers[i]) + to_float(bias.numbers[i])) * gate;
    }
    columns.store(to, v, y);
  }
}

// A block stays and walks over the rows; a lane has the same columns in all of them and adds up its
// part of the gradients of weight and bias in registers.
template <typename E, typename W, int NUMBERS, bool ALIGNED>
__global__ void __launch_bounds__(BACKWARD_THREADS, backward_blocks(sizeof(E), NUMBERS))
    gated_layer_norm_backward_kernel(const GatedNorm<E, W> norm,
                                     const GatedNormGradients<E> gradients, int lanes) {
  constexpr int SIZE = VECTOR<E>, VECTORS = NUMBERS / SIZE, WARPS = BACKWARD_THREADS / 32;
  // [2, WARPS, 3], of alternate rows, and [groups, spread(channels)].
  float* exchange = reinterpret_cast<float*>(shared_memory());
  float* shared = exchange + 2 * WARPS * 3;
  const int groups = BACKWARD_THREADS / lanes, group = int(threadIdx.x) / lanes;
  const LaneColumns<SIZE, ALIGNED> columns(int(threadIdx.x) % lanes, lanes, norm.channels);
  float weight_sums[VECTORS][SIZE] = {}, bias_sums[VECTORS][SIZE] = {};
  const float share = 1.0f / float(norm.channels);
  bool odd = false;
  // All threads make the same turns, for the sake of the exchange.
  for (int first = int(blockIdx.x) * groups; first < norm.rows;
       first += int(gridDim.x) * groups, odd = !odd) {
    const int row = first + group;
    const bool exists = row < norm.rows;
    Numbers<E, SIZE> x[VECTORS], g[VECTORS];
    const E* x_row = exists ? norm.row_of(norm.x, row) : norm.x.first;
    const E* g_row = exists ? norm.row_of(gradients.grad_out, row) : gradients.grad_out.first;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      columns.load(x[v], x_row, v, exists);
      columns.load(g[v], g_row, v, exists);
    }
    // A row that is not there has G = 0 and n = 0, and adds nothing.
    const float mean = exists ? gradients.mean[row] : 0.0f;
    const float rstd = exists ? gradients.rstd[row] : 0.0f;
    const float gate = exists ? norm.gate_of(row) : 0.0f;
    float weighted[VECTORS][SIZE];
    float sums[3] = {};  // of G w, G w n and G b
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      Numbers<W, SIZE> weight, bias;
      columns.load(weight, norm.weight, v);
      columns.load(bias, norm.bias, v);
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const float grad = to_float(g[v].numbers[i]), gated = grad * gate;
        const float n = (to_float(x[v].numbers[i]) - mean) * rstd;
        weighted[v][i] = grad * to_float(weight.numbers[i]);
        sums[0] += weighted[v][i];
        sums[1] += weighted[v][i] * n;
        sums[2] += grad * to_float(bias.numbers[i]);
        weight_sums[v][i] += gated * n;
        bias_sums[v][i] += gated;
      }
    }
    sum_over_lanes(sums, lanes, exchange + (odd ? WARPS * 3 : 0));
    if (!exists) continue;
    if (gradients.grad_gate && int(threadIdx.x) % lanes == 0)
      gradients.grad_gate[row] = sums[1] + sums[2];
    const float factor = rstd * gate, average = sums[0] * share, slope = sums[1] * share;
    E* to = gradients.grad_x + int64_t(row) * norm.channels;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      // Weights wider than x leave no registers for n, which is computed once more.
      if (sizeof(W) > sizeof(E)) x[v].make_opaque();
      float grad_x[SIZE];
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const float n = (to_float(x[v].numbers[i]) - mean) * rstd;
        grad_x[i] = factor * (weighted[v][i] - average - n * slope);
      }
      columns.store(to, v, grad_x);
    }
  }
  float* own = shared + group * spread(norm.channels);
  float* grad_affine = gradients.grad_affine + int64_t(blockIdx.x) * 2 * norm.channels;
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v)
#pragma unroll
      for (int i = 0; i < SIZE; ++i)
        if (columns.has(v, i))
          own[spread(columns.at(v, i))] = kind == 0 ? weight_sums[v][i] : bias_sums[v][i];
    __syncthreads();
    sum_over_groups(shared, groups, norm.channels, grad_affine + kind * norm.channels);
    __syncthreads();
  }
}

}  // namespace vitslim
