// Layer norm whose rows are scaled by a gate per token: which kernel takes which rows.
//
//   n = (x - mean) rstd        y = n w + b        out = y gate[token]
//
// Memory bounds it, so that a row is read once and stays in registers between its statistics and
// what is made of them (gated_layer_norm_rows.cuh); only rows of more channels than a block has
// registers for are read again (gated_layer_norm_long.cuh).

#include <algorithm>
#include <type_traits>

#include "../gated_layer_norm.h"
#include "gated_layer_norm_long.cuh"
#include "gated_layer_norm_rows.cuh"
#include "launch.cuh"

namespace vitslim {
namespace {

// How many numbers a lane may hold of a row. Backward keeps two sums for each, beside x and G.
constexpr int FORWARD_NUMBERS[] = {24, 32}, BACKWARD_NUMBERS[] = {16, 24};
constexpr int64_t LONG_AFFINE_BLOCKS = 4;  // of a multiprocessor

// The lanes of a row, and whether each holds the more numbers of the two; no lanes where the row is
// too long.
struct Share {
  int lanes;
  bool more;
};

// The least that hold the row, which leaves at most a third of them idle: 192, 384 and 768 channels
// leave none.
Share share_of(int64_t channels, const int (&numbers)[2], int threads) {
  for (int lanes = 8; lanes <= threads; lanes *= 2)
    for (const bool more : {false, true})
      if (lanes * numbers[more] >= channels) return {lanes, more};
  return {0, false};
}
Share forward_share(int64_t channels) {
  return share_of(channels, FORWARD_NUMBERS, FORWARD_THREADS);
}
Share backward_share(int64_t channels) {
  return share_of(channels, BACKWARD_NUMBERS, BACKWARD_THREADS);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool empty(const GatedLayerNormShape& shape) {
  return shape.batch == 0 || shape.tokens == 0 || shape.channels == 0;
}

int64_t strips_of(int64_t channels) { return ceil_div(channels, LONG_THREADS); }

int64_t floats(int64_t count) { return count * int64_t(sizeof(float)); }

template <typename E>
bool aligned(const void* first, int64_t batch_stride, int64_t token_stride) {
  return aligned16(first) && batch_stride % VECTOR<E> == 0 && token_stride % VECTOR<E> == 0;
}

auto describe(const GatedLayerNormShape& shape) {
  return [&](std::ostream& out) {
    out << shape.batch << " images, " << shape.tokens << " tokens, " << shape.channels
        << " channels";
  };
}

template <typename E, typename W, typename Call>
GatedNorm<E, W> norm_of(const Call& call) {
  const GatedLayerNormShape& shape = call.shape;
  if (shape.batch * shape.tokens > INT32_MAX / 2 || shape.channels > INT32_MAX / 2)
    throw std::runtime_error("gated_layer_norm: more than 2^30 rows or channels.");
  return {int(shape.batch * shape.tokens),
          int(shape.tokens),
          int(shape.channels),
          {static_cast<const E*>(call.x), shape.x_batch_stride, shape.x_token_stride},
          static_cast<const W*>(call.weight),
          static_cast<const W*>(call.bias),
          call.gate};
}

// Calls body(E(), W()).
template <typename Body>
void with_dtypes(const GatedLayerNormShape& shape, const Body& body) {
  const bool wide = shape.weight_dtype == DType::FLOAT32;
  if (!wide && shape.weight_dtype != shape.dtype)
    throw std::runtime_error("gated_layer_norm: weight has neither x's dtype nor float32.");
  if (shape.dtype == DType::FLOAT32) return body(float(), float());
  if (shape.dtype == DType::BFLOAT16)
    return wide ? body(BFloat16(), float()) : body(BFloat16(), BFloat16());
  wide ? body(Half(), float()) : body(Half(), Half());
}

// Calls body(std::integral_constant<int, NUMBERS>(), std::bool_constant<ALIGNED>()).
template <int FEW, int MANY, typename Body>
void with_variant(bool more, bool is_aligned, const Body& body) {
  using Few = std::integral_constant<int, FEW>;
  using Many = std::integral_constant<int, MANY>;
  if (is_aligned) return more ? body(Many(), std::true_type()) : body(Few(), std::true_type());
  more ? body(Many(), std::false_type()) : body(Few(), std::false_type());
}

template <typename E, typename W>
void forward(const GatedLayerNormForward& call, const Gpu& gpu) {
  const GatedLayerNormShape& shape = call.shape;
  const GatedNorm<E, W> norm = norm_of<E, W>(call);
  const Share share = forward_share(norm.channels);
  E* out = static_cast<E*>(call.out);
  if (share.lanes == 0)
    return launch("gated_layer_norm_long_forward_kernel",
                  gated_layer_norm_long_forward_kernel<E, W>,
                  Grid{norm.rows, LONG_THREADS, floats(LONG_THREADS / 32)}, gpu, describe(shape),
                  norm, call.eps, out, call.mean, call.rstd);
  const bool is_aligned = aligned<E>(call.x, shape.x_batch_stride, shape.x_token_stride) &&
                          shape.channels % VECTOR<E> == 0 && aligned16(call.weight) &&
                          aligned16(call.bias) && aligned16(call.out);
  const int threads = std::max(128, share.lanes);
  const Grid grid{ceil_div(norm.rows, threads / share.lanes), threads, floats(2 * threads / 32)};
  with_variant<FORWARD_NUMBERS[0], FORWARD_NUMBERS[1]>(
      share.more, is_aligned, [&](auto numbers, auto variant) {
        launch("gated_layer_norm_forward_kernel",
               gated_layer_norm_forward_kernel<E, W, numbers(), variant()>, grid, gpu,
               describe(shape), norm, call.eps, share.lanes, out, call.mean, call.rstd);
      });
}

template <typename E, typename W>
void backward(const GatedLayerNormBackward& call, const Gpu& gpu) {
  const GatedLayerNormShape& shape = call.shape;
  const GatedNorm<E, W> norm = norm_of<E, W>(call);
  const GatedNormGradients<E> gradients{{static_cast<const E*>(call.grad_out),
                                         call.grad_out_batch_stride, call.grad_out_token_stride},
                                        call.mean,
                                        call.rstd,
                                        static_cast<E*>(call.grad_x),
                                        call.grad_affine,
                                        call.gate ? call.grad_gate : nullptr};
  const int64_t blocks = gated_layer_norm_grad_affine_rows_cuda(shape, gpu);
  const Share share = backward_share(norm.channels);
  if (share.lanes == 0) {
    launch("gated_layer_norm_long_backward_kernel", gated_layer_norm_long_backward_kernel<E, W>,
           Grid{norm.rows, LONG_THREADS, floats(3 * LONG_THREADS / 32)}, gpu, describe(shape), norm,
           gradients);
    return launch("gated_layer_norm_long_affine_kernel", gated_layer_norm_long_affine_kernel<E, W>,
                  Grid{blocks * strips_of(norm.channels), LONG_THREADS, 0}, gpu, describe(shape),
                  norm, gradients, int(blocks));
  }
  const bool is_aligned =
      aligned<E>(call.x, shape.x_batch_stride, shape.x_token_stride) &&
      aligned<E>(call.grad_out, call.grad_out_batch_stride, call.grad_out_token_stride) &&
      shape.channels % VECTOR<E> == 0 && aligned16(call.weight) && aligned16(call.bias) &&
      aligned16(call.grad_x);
  const int groups = BACKWARD_THREADS / share.lanes;
  const Grid grid{blocks, BACKWARD_THREADS,
                  floats(2 * BACKWARD_THREADS / 32 * 3 + groups * spread(norm.channels))};
  with_variant<BACKWARD_NUMBERS[0], BACKWARD_NUMBERS[1]>(
      share.more, is_aligned, [&](auto numbers, auto variant) {
        launch("gated_layer_norm_backward_kernel",
               gated_layer_norm_backward_kernel<E, W, numbers(), variant()>, grid, gpu,
               describe(shape), norm, gradients, share.lanes);
      });
}

}  // namespace

void gated_layer_norm_forward_cuda(const GatedLayerNormForward& call, const Gpu& gpu) {
  if (empty(call.shape)) return;
  with_dtypes(call.shape, [&]<typename E, typename W>(E, W) { forward<E, W>(call, gpu); });
}

void gated_layer_norm_backward_cuda(const GatedLayerNormBackward& call, const Gpu& gpu) {
  if (empty(call.shape)) return;
  with_dtypes(call.shape, [&]<typename E, typename W>(E, W) { backward<E, W>(call, gpu); });
}

int64_t gated_layer_norm_grad_affine_rows_cuda(const GatedLayerNormShape& shape, const Gpu&) {
  if (empty(shape)) return 0;
  const int64_t rows = shape.batch * shape.tokens, processors = current_device().processors;
  const Share share = backward_share(shape.channels);
  if (share.lanes > 0) {
    const int blocks =
        backward_blocks(shape.dtype == DType::FLOAT32 ? 4 : 2, BACKWARD_NUMBERS[share.more]);
    return std::min(ceil_div(rows, BACKWARD_THREADS / share.lanes), processors * blocks);
  }
  const int64_t room = LONG_AFFINE_BLOCKS * processors / strips_of(shape.channels);
  return std::max<int64_t>(1, std::min(ceil_div(rows, 4), room));
}

}  // namespace vitslim
