// gated_layer_norm as torch ops, which are native on GPUs alone.

#include <tuple>

#include "../gated_layer_norm.h"
#include "current_gpu.h"

namespace vitslim::binding {
namespace {

// Checks of both directions, and the part of the call that they share.
struct Norm {
  Tensor x, weight, bias;
  std::optional<Tensor> gate;
  GatedLayerNormShape shape;

  Norm(const char* op, const Tensor& x_in, const Tensor& weight_in, const Tensor& bias_in,
       const std::optional<Tensor>& gate_in)
      : x(x_in), weight(weight_in), bias(bias_in) {
    require(x.dim() == 3, op, ": x must have the shape [batch, tokens, channels], but has ",
            shape_text(x), ".");
    const DType dtype = dtype_of(op, "x", x);
    const ScalarType type = weight.scalar_type();
    require(type == ScalarType::Float || type == x.scalar_type(), op,
            ": weight must be float32 or ", type_text(x.scalar_type()), ".");
    require_like(op, "weight", weight, {x.size(2)}, type, x);
    require_like(op, "bias", bias, {x.size(2)}, type, x);
    gate = vector_or_none(op, "gate", gate_in, x.size(1), x);
    weight = torch::stable::contiguous(weight);
    bias = torch::stable::contiguous(bias);
    x = with_unit_columns(x);
    shape = {x.size(0),   x.size(1),  x.size(2), dtype, dtype_of(op, "weight", weight),
             x.stride(0), x.stride(1)};
  }
  Norm(const Norm&) = delete;
};

std::tuple<Tensor, Tensor, Tensor> gated_layer_norm_forward_cuda(const Tensor& x,
                                                                 const Tensor& weight,
                                                                 const Tensor& bias, double eps,
                                                                 std::optional<Tensor> gate) {
  const Norm norm("gated_layer_norm_forward", x, weight, bias, gate);
  const GatedLayerNormShape& shape = norm.shape;
  Tensor out = empty(x, {shape.batch, shape.tokens, shape.channels});
  Tensor mean = empty_float32(x, {shape.batch, shape.tokens, 1});
  Tensor rstd = empty_float32(x, {shape.batch, shape.tokens, 1});
  vitslim::gated_layer_norm_forward_cuda(
      {shape, norm.x.const_data_ptr(), norm.weight.const_data_ptr(), norm.bias.const_data_ptr(),
       float(eps), data_or_null(norm.gate), out.mutable_data_ptr(), mean.mutable_data_ptr<float>(),
       rstd.mutable_data_ptr<float>()},
      CurrentGpu(x));
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_layer_norm_backward_cuda(
    const Tensor& grad_out_in, const Tensor& x, const Tensor& weight, const Tensor& bias,
    std::optional<Tensor> gate, const Tensor& mean_in, const Tensor& rstd_in) {
  const char* op = "gated_layer_norm_backward";
  const Norm norm(op, x, weight, bias, gate);
  const GatedLayerNormShape& shape = norm.shape;
  const std::vector<int64_t> statistics{shape.batch, shape.tokens, 1};
  require_like(op, "grad_out", grad_out_in, sizes_of(x), x.scalar_type(), x);
  require_like(op, "mean", mean_in, statistics, ScalarType::Float, x);
  require_like(op, "rstd", rstd_in, statistics, ScalarType::Float, x);
  const Tensor grad_out = with_unit_columns(grad_out_in);
  const Tensor mean = torch::stable::contiguous(mean_in);
  const Tensor rstd = torch::stable::contiguous(rstd_in);
  Tensor grad_x = empty(x, sizes_of(x));

  const CurrentGpu gpu(x);
  Tensor affine =
      empty_float32(x, {gated_layer_norm_grad_affine_rows_cuda(shape, gpu), 2 * shape.channels});
  // [batch, tokens] where there is a gate. Without channels nothing is computed, and no rows add up
  // to zeros.
  Tensor gates = empty_float32(x, {gate && shape.channels ? shape.batch : 0, shape.tokens});
  vitslim::gated_layer_norm_backward_cuda(
      {shape, grad_out.const_data_ptr(), grad_out.stride(0), grad_out.stride(1),
       norm.x.const_data_ptr(), norm.weight.const_data_ptr(), norm.bias.const_data_ptr(),
       data_or_null(norm.gate), mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(),
       grad_x.mutable_data_ptr(), affine.mutable_data_ptr<float>(),
       gate ? gates.mutable_data_ptr<float>() : nullptr},
      gpu);
  return {grad_x, column_sums(affine, 0, shape.channels, weight, gpu),
          column_sums(affine, shape.channels, shape.channels, weight, gpu),
          column_sums(gates, 0, gate ? shape.tokens : 0, gates, gpu)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(vitslim_native, m) {
  m.def(
      "gated_layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps, Tensor? gate)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "gated_layer_norm_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor bias,"
      " Tensor? gate, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vitslim_native, CUDA, m) {
  m.impl("gated_layer_norm_forward", TORCH_BOX(&gated_layer_norm_forward_cuda));
  m.impl("gated_layer_norm_backward", TORCH_BOX(&gated_layer_norm_backward_cuda));
}

}  // namespace
}  // namespace vitslim::binding
