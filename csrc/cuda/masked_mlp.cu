// What a masked MLP does between its products, element by element on matrices [rows, units]:
//
//   forward    h = z act(u)
//   backward   grad_u = E z act'(u)      h = z act(u)      sums of grad_u and of E act(u)
//
// A block has a strip of units and walks down its rows: a thread keeps 16 bytes of every row, its
// part of the mask and its sums in registers, and `lanes` threads side by side have the strip's
// width. The other threads take other rows. Each matrix is read or written once. At the end the
// block's sums meet in shared memory and become one row of `sums`.

#include <algorithm>
#include <type_traits>

#include "../masked_mlp.h"
#include "activations.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace vitslim {
namespace {

constexpr int THREADS = 256;
constexpr int FORWARD_BLOCKS = 4, BACKWARD_BLOCKS = 3;  // of a multiprocessor
// Rows that a thread loads before it computes, where they are aligned.
constexpr int FORWARD_ROWS = 4, BACKWARD_ROWS = 2;

struct Strips {
  int lanes;   // of a strip
  int strips;  // that the units fill
  int row_blocks;
};

template <typename E>
struct Matrix {
  int64_t rows;
  int units;
  const float* mask;  // [units] or null
  Strips strips;
};

// This thread's place: its strip, and the rows it walks through.
template <typename E, bool ALIGNED>
struct Walk {
  int first_column;                         // of the strip
  int width;                                // of the strip
  LaneColumns<VECTOR<E>, ALIGNED> columns;  // in the strip
  int64_t row, step;

  __device__ explicit Walk(const Matrix<E>& what)
      : first_column(int(blockIdx.x) % what.strips.strips * what.strips.lanes * VECTOR<E>),
        width(what.units - first_column < what.strips.lanes * VECTOR<E>
                  ? what.units - first_column
                  : what.strips.lanes * VECTOR<E>),
        columns(int(threadIdx.x) % what.strips.lanes, what.strips.lanes, width) {
    const int groups = THREADS / what.strips.lanes;
    row = int64_t(int(blockIdx.x) / what.strips.strips) * groups +
          int(threadIdx.x) / what.strips.lanes;
    step = int64_t(what.strips.row_blocks) * groups;
  }

  __device__ void load_mask(float (&mask)[VECTOR<E>], const float* from) const {
    // The mask need not be aligned: it is loaded once.
#pragma unroll
    for (int i = 0; i < VECTOR<E>; ++i)
      mask[i] = from && columns.has(0, i) ? from[first_column + columns.at(0, i)] : 1.0f;
  }
};

template <typename E, Activation ACTIVATION, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS)
    masked_activation_forward_kernel(const Matrix<E> what,
                                     const E* pre_act,  // [rows, units]
                                     E* hidden) {       // [rows, units]
  constexpr int SIZE = VECTOR<E>, ROWS = ALIGNED ? FORWARD_ROWS : 1;
  const Walk<E, ALIGNED> walk(what);
  float mask[SIZE];
  walk.load_mask(mask, what.mask);
  for (int64_t row = walk.row; row < what.rows; row += ROWS * walk.step) {
    Numbers<E, SIZE> u[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t here = row + r * walk.step;
      walk.columns.load(u[r], pre_act + here * what.units + walk.first_column, 0, here < what.rows);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t here = row + r * walk.step;
      if (here >= what.rows) break;
      float h[SIZE];
#pragma unroll
      for (int i = 0; i < SIZE; ++i)
        h[i] = mask[i] * activate<ACTIVATION>(to_float(u[r].numbers[i])).value;
      walk.columns.store(hidden + here * what.units + walk.first_column, 0, h);
    }
  }
}

// Numbers that are loaded one by one have an address each, and so one block less its registers.
template <typename E, Activation ACTIVATION, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, ALIGNED ? BACKWARD_BLOCKS : BACKWARD_BLOCKS - 1)
    masked_activation_backward_kernel(const Matrix<E> what,
                                      const E* grad_hidden,  // [rows, units]
                                      const E* pre_act,      // [rows, units]
                                      E* grad_pre_act,       // [rows, units]; may be grad_hidden
                                      E* hidden,             // [rows, units]
                                      float* sums) {         // [row_blocks, 2 * units]
  constexpr int SIZE = VECTOR<E>, ROWS = ALIGNED ? BACKWARD_ROWS : 1;
  const Walk<E, ALIGNED> walk(what);
  const int first = walk.first_column;
  float mask[SIZE], bias_sums[SIZE] = {}, mask_sums[SIZE] = {};
  walk.load_mask(mask, what.mask);
  for (int64_t row = walk.row; row < what.rows; row += ROWS * walk.step) {
    // All loads come before all stores, which the compiler may not reorder: the gradients may share
    // their memory.
    Numbers<E, SIZE> e[ROWS], u[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t here = row + r * walk.step;
      walk.columns.load(e[r], grad_hidden + here * what.units + first, 0, here < what.rows);
      walk.columns.load(u[r], pre_act + here * what.units + first, 0, here < what.rows);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t here = row + r * walk.step;
      if (here >= what.rows) break;
      float h[SIZE], grad[SIZE];
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const Activated act = activate<ACTIVATION>(to_float(u[r].numbers[i]));
        const float upper = to_float(e[r].numbers[i]);
        mask_sums[i] += upper * act.value;
        h[i] = mask[i] * act.value;
        grad[i] = upper * mask[i] * act.slope;
        bias_sums[i] += grad[i];
      }
      walk.columns.store(hidden + here * what.units + first, 0, h);
      walk.columns.store(grad_pre_act + here * what.units + first, 0, grad);
    }
  }
  // [THREADS / lanes, spread(the strip's width)] for one kind of sums after the other.
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int width = walk.width, groups = THREADS / what.strips.lanes;
  float* own = shared + int(threadIdx.x) / what.strips.lanes * spread(width);
  float* to = sums + int64_t(blockIdx.x) / what.strips.strips * 2 * what.units + first;
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      if (walk.columns.has(0, i))
        own[spread(walk.columns.at(0, i))] = kind == 0 ? bias_sums[i] : mask_sums[i];
    __syncthreads();
    sum_over_groups(shared, groups, width, to + kind * what.units);
    __syncthreads();
  }
}

// Strips as wide as a warp, or narrower where that leaves fewer lanes idle; a quarter of a warp
// still reads 128 bytes of a row. And as many blocks as the multiprocessors hold at a time, or as
// the rows need.
Strips plan(const MaskedActivation& what, int blocks_of_processor, int rows_of_thread) {
  const int size = what.dtype == DType::FLOAT32 ? VECTOR<float> : VECTOR<Half>;
  Strips best{};
  for (int lanes = 32; lanes >= 8; lanes /= 2) {
    const int64_t strips = (what.units + lanes * size - 1) / (lanes * size);
    if (best.lanes == 0 || strips * lanes < int64_t(best.strips) * best.lanes)
      best = {lanes, int(strips), 0};
  }
  if (what.rows == 0 || what.units == 0) return best;
  const int64_t rows_of_block = int64_t(THREADS / best.lanes) * rows_of_thread;
  const int64_t needed = (what.rows + rows_of_block - 1) / rows_of_block;
  const int64_t room = int64_t(current_device().processors) * blocks_of_processor / best.strips;
  best.row_blocks = int(std::max<int64_t>(1, std::min(needed, room)));
  return best;
}

// Calls body(std::integral_constant<Activation, A>(), std::bool_constant<ALIGNED>()).
template <typename Body>
void with_variant(Activation activation, bool aligned, const Body& body) {
  const auto either = [&](auto constant) {
    if (aligned) return body(constant, std::true_type());
    body(constant, std::false_type());
  };
  switch (activation) {
    case Activation::GELU:
      return either(std::integral_constant<Activation, Activation::GELU>());
    case Activation::GELU_TANH:
      return either(std::integral_constant<Activation, Activation::GELU_TANH>());
    case Activation::QUICK_GELU:
      return either(std::integral_constant<Activation, Activation::QUICK_GELU>());
    case Activation::SILU:
      return either(std::integral_constant<Activation, Activation::SILU>());
    case Activation::RELU:
      return either(std::integral_constant<Activation, Activation::RELU>());
    case Activation::NONE:
      break;
  }
  throw std::runtime_error(
      "masked_mlp needs an activation: gelu, gelu_tanh, quick_gelu, silu or relu.");
}

template <typename Body>
void with_dtype(DType dtype, const Body& body) {
  if (dtype == DType::FLOAT32) return body(float());
  if (dtype == DType::BFLOAT16) return body(BFloat16());
  body(Half());
}

auto describe(const MaskedActivation& what) {
  return [&](std::ostream& out) { out << what.rows << " rows, " << what.units << " units"; };
}

// Of all units in whole vectors, and of all pointers.
template <typename E, typename... Pointers>
bool all_aligned(const MaskedActivation& what, Pointers... pointers) {
  return what.units % VECTOR<E> == 0 && (aligned16(pointers) && ...);
}

}  // namespace

void masked_activation_forward_cuda(const MaskedActivationForward& call, const Gpu& gpu) {
  const MaskedActivation& what = call.what;
  const Strips strips = plan(what, FORWARD_BLOCKS, FORWARD_ROWS);
  with_dtype(what.dtype, [&]<typename E>(E) {
    const bool aligned = all_aligned<E>(what, call.pre_act, call.hidden);
    with_variant(what.activation, aligned, [&](auto activation, auto is_aligned) {
      launch("masked_activation_forward_kernel",
             masked_activation_forward_kernel<E, activation(), is_aligned()>,
             Grid{int64_t(strips.row_blocks) * strips.strips, THREADS, 0}, gpu, describe(what),
             Matrix<E>{what.rows, int(what.units), what.mask, strips},
             static_cast<const E*>(call.pre_act), static_cast<E*>(call.hidden));
    });
  });
}

void masked_activation_backward_cuda(const MaskedActivationBackward& call, const Gpu& gpu) {
  const MaskedActivation& what = call.what;
  const Strips strips = plan(what, BACKWARD_BLOCKS, BACKWARD_ROWS);
  with_dtype(what.dtype, [&]<typename E>(E) {
    const bool aligned =
        all_aligned<E>(what, call.grad_hidden, call.pre_act, call.grad_pre_act, call.hidden);
    const int width = int(std::min<int64_t>(what.units, strips.lanes * VECTOR<E>));
    const int64_t shared = int64_t(THREADS / strips.lanes) * spread(width) * int64_t(sizeof(float));
    with_variant(what.activation, aligned, [&](auto activation, auto is_aligned) {
      launch("masked_activation_backward_kernel",
             masked_activation_backward_kernel<E, activation(), is_aligned()>,
             Grid{int64_t(strips.row_blocks) * strips.strips, THREADS, shared}, gpu, describe(what),
             Matrix<E>{what.rows, int(what.units), what.mask, strips},
             static_cast<const E*>(call.grad_hidden), static_cast<const E*>(call.pre_act),
             static_cast<E*>(call.grad_pre_act), static_cast<E*>(call.hidden), call.sums);
    });
  });
}

int64_t masked_activation_sum_rows_cuda(const MaskedActivation& what, const Gpu&) {
  return plan(what, BACKWARD_BLOCKS, BACKWARD_ROWS).row_blocks;
}

}  // namespace vitslim
