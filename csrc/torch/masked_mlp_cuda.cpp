// What a masked MLP does between its products as torch ops, which are native on GPUs alone.

#include <tuple>

#include "../masked_mlp.h"
#include "current_gpu.h"

namespace vitslim::binding {
namespace {

// The pre-activation and the mask, checked.
struct Hidden {
  Tensor pre_act;
  std::optional<Tensor> mask;
  MaskedActivation what;

  Hidden(const char* op, const Tensor& pre_act_in, const std::optional<Tensor>& mask_in,
         const std::string& activation)
      : pre_act(pre_act_in) {
    require(pre_act.dim() == 2, op, ": pre_act must have the shape [rows, units], but has ",
            shape_text(pre_act), ".");
    const DType dtype = dtype_of(op, "pre_act", pre_act);
    mask = vector_or_none(op, "mask", mask_in, pre_act.size(1), pre_act);
    pre_act = torch::stable::contiguous(pre_act);
    what = {pre_act.size(0), pre_act.size(1), dtype, activation_of(op, activation),
            data_or_null(mask)};
  }
  Hidden(const Hidden&) = delete;
};

Tensor masked_activation_forward_cuda(const Tensor& pre_act, std::optional<Tensor> mask,
                                      std::string activation) {
  const Hidden given("masked_activation_forward", pre_act, mask, activation);
  Tensor hidden = empty(pre_act, {given.what.rows, given.what.units});
  vitslim::masked_activation_forward_cuda(
      {given.what, given.pre_act.const_data_ptr(), hidden.mutable_data_ptr()}, CurrentGpu(pre_act));
  return hidden;
}

std::tuple<Tensor, Tensor, Tensor> masked_activation_backward_cuda(const Tensor& grad_hidden,
                                                                   const Tensor& pre_act,
                                                                   std::optional<Tensor> mask,
                                                                   std::string activation) {
  const char* op = "masked_activation_backward";
  const Hidden given(op, pre_act, mask, activation);
  const MaskedActivation& what = given.what;
  require_like(op, "grad_hidden", grad_hidden, {what.rows, what.units}, pre_act.scalar_type(),
               pre_act);
  require(grad_hidden.is_contiguous(), op,
          ": grad_hidden must be contiguous, for it is overwritten.");
  void* grad = grad_hidden.mutable_data_ptr();
  Tensor hidden = empty(pre_act, {what.rows, what.units});

  const CurrentGpu gpu(pre_act);
  Tensor sums =
      empty_float32(pre_act, {masked_activation_sum_rows_cuda(what, gpu), 2 * what.units});
  vitslim::masked_activation_backward_cuda(
      {what, grad, given.pre_act.const_data_ptr(), grad, hidden.mutable_data_ptr(),
       sums.mutable_data_ptr<float>()},
      gpu);
  return {hidden, column_sums(sums, 0, what.units, pre_act, gpu),
          column_sums(sums, what.units, mask ? what.units : 0, sums, gpu)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(vitslim_native, m) {
  m.def("masked_activation_forward(Tensor pre_act, Tensor? mask, str activation) -> Tensor");
  // What comes back is the hidden units and the gradients of their bias and of the mask;
  // grad_hidden becomes the gradient of pre_act.
  m.def(
      "masked_activation_backward(Tensor(a!) grad_hidden, Tensor pre_act, Tensor? mask,"
      " str activation) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vitslim_native, CUDA, m) {
  m.impl("masked_activation_forward", TORCH_BOX(&masked_activation_forward_cuda));
  m.impl("masked_activation_backward", TORCH_BOX(&masked_activation_backward_cuda));
}

}  // namespace
}  // namespace vitslim::binding
