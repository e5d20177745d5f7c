// ragged_attention as torch ops, on the CPU and, where it is built, with CUDA.

#include "../ragged_attention.h"

#include <tuple>
#include <utility>

#include "tensor.h"
#ifdef VITSLIM_CUDA
#include "current_gpu.h"
#endif

namespace vitslim::binding {
namespace {

// Checks of both directions, and the part of the call that they share.
struct Call {
  std::vector<int64_t> head_offsets;
  Tensor qkv;
  std::optional<Tensor> mask;
  RaggedAttentionShape shape;

  Call(const char* op, const Tensor& qkv_in, const std::vector<int64_t>& head_dims, double scale,
       const std::optional<Tensor>& mask_in)
      : head_offsets{0}, qkv(qkv_in) {
    for (const int64_t width : head_dims) {
      require(width >= 0, op, ": head_dims has the negative width ", width, ".");
      head_offsets.push_back(head_offsets.back() + width);
    }
    require(qkv.dim() == 3 && qkv.size(2) == 3 * embed_dim(), op,
            ": qkv must have the shape [batch, tokens, 3 * sum(head_dims) = ", 3 * embed_dim(),
            "], but has ", shape_text(qkv), ".");
    const DType dtype = dtype_of(op, "qkv", qkv);
    mask = vector_or_none(op, "mask", mask_in, embed_dim(), qkv);
    qkv = with_unit_columns(qkv);
    shape = {qkv.size(0),         qkv.size(1),  int64_t(head_dims.size()),
             head_offsets.data(), float(scale), dtype,
             qkv.stride(0),       qkv.stride(1)};
  }
  Call(const Call&) = delete;

  int64_t embed_dim() const { return head_offsets.back(); }
  std::vector<int64_t> statistics() const { return {shape.batch, shape.heads, shape.tokens}; }
};

// Forward's check, tensors and call; `run` is the kernel.
template <typename Run>
std::tuple<Tensor, Tensor> forward(const Tensor& qkv, const std::vector<int64_t>& head_dims,
                                   double scale, const std::optional<Tensor>& mask, Run run) {
  const Call call("ragged_attention_forward", qkv, head_dims, scale, mask);
  Tensor out = empty(qkv, {call.shape.batch, call.shape.tokens, call.embed_dim()});
  Tensor lse = empty_float32(qkv, call.statistics());
  run({call.shape, call.qkv.const_data_ptr(), data_or_null(call.mask), out.mutable_data_ptr(),
       lse.mutable_data_ptr<float>()});
  return {out, lse};
}

// The tensors of backward, checked and as the kernels want them.
struct BackwardCall : Call {
  Tensor grad_out, out, lse, grad_qkv;

  BackwardCall(const char* op, const Tensor& grad_out_in, const Tensor& qkv_in,
               const Tensor& out_in, const Tensor& lse_in, const std::vector<int64_t>& head_dims,
               double scale, const std::optional<Tensor>& mask_in)
      : Call(op, qkv_in, head_dims, scale, mask_in),
        grad_out(grad_out_in),
        out(out_in),
        lse(lse_in) {
    const std::vector<int64_t> sizes{shape.batch, shape.tokens, embed_dim()};
    require_like(op, "grad_out", grad_out, sizes, qkv.scalar_type(), qkv);
    require_like(op, "out", out, sizes, qkv.scalar_type(), qkv);
    require_like(op, "lse", lse, statistics(), ScalarType::Float, qkv);
    grad_out = with_unit_columns(grad_out);
    out = torch::stable::contiguous(out);
    lse = torch::stable::contiguous(lse);
    grad_qkv = empty(qkv, {shape.batch, shape.tokens, 3 * embed_dim()});
  }

  RaggedAttentionBackward with(float* grad_mask, float* delta) const {
    return {shape,
            grad_out.const_data_ptr(),
            grad_out.stride(0),
            grad_out.stride(1),
            qkv.const_data_ptr(),
            out.const_data_ptr(),
            lse.const_data_ptr<float>(),
            data_or_null(mask),
            grad_qkv.mutable_data_ptr(),
            grad_mask,
            delta};
  }
};

// How float32 is multiplied is a matter of tensor cores alone.
std::tuple<Tensor, Tensor> ragged_attention_forward_cpu(const Tensor& qkv,
                                                        std::vector<int64_t> head_dims,
                                                        double scale, std::optional<Tensor> mask,
                                                        int64_t /*float32_parts*/) {
  return forward(qkv, head_dims, scale, mask, [](const RaggedAttentionForward& call) {
    vitslim::ragged_attention_forward_cpu(call, torch_threads());
  });
}

std::tuple<Tensor, Tensor> ragged_attention_backward_cpu(const Tensor& grad_out, const Tensor& qkv,
                                                         const Tensor& out, const Tensor& lse,
                                                         std::vector<int64_t> head_dims,
                                                         double scale, std::optional<Tensor> mask,
                                                         int64_t /*float32_parts*/) {
  const BackwardCall call("ragged_attention_backward", grad_out, qkv, out, lse, head_dims, scale,
                          mask);
  const int64_t columns = mask ? call.embed_dim() : 0;
  Tensor rows = empty_float32(qkv, {call.shape.batch, columns});
  vitslim::ragged_attention_backward_cpu(call.with(rows.mutable_data_ptr<float>(), nullptr),
                                         torch_threads());
  // Images are added up here, in order, so that the sum is the same for any number of threads.
  Tensor grad_mask = empty_float32(qkv, {columns});
  const float* parts = rows.const_data_ptr<float>();
  float* sums = grad_mask.mutable_data_ptr<float>();
  for (int64_t c = 0; c < columns; ++c) {
    double sum = 0;
    for (int64_t image = 0; image < call.shape.batch; ++image) sum += parts[image * columns + c];
    sums[c] = float(sum);
  }
  return {call.grad_qkv, grad_mask};
}

#ifdef VITSLIM_CUDA
void require_parts(const char* op, int64_t float32_parts) {
  require(float32_parts == 2 || float32_parts == 3, op, ": float32_parts must be 2 or 3, but is ",
          float32_parts, ".");
}

std::tuple<Tensor, Tensor> ragged_attention_forward_cuda(const Tensor& qkv,
                                                         std::vector<int64_t> head_dims,
                                                         double scale, std::optional<Tensor> mask,
                                                         int64_t float32_parts) {
  require_parts("ragged_attention_forward", float32_parts);
  return forward(qkv, head_dims, scale, mask, [&](const RaggedAttentionForward& call) {
    vitslim::ragged_attention_forward_cuda(call, CurrentGpu(qkv, float32_parts));
  });
}

std::tuple<Tensor, Tensor> ragged_attention_backward_cuda(const Tensor& grad_out, const Tensor& qkv,
                                                          const Tensor& out, const Tensor& lse,
                                                          std::vector<int64_t> head_dims,
                                                          double scale, std::optional<Tensor> mask,
                                                          int64_t float32_parts) {
  const char* op = "ragged_attention_backward";
  require_parts(op, float32_parts);
  const BackwardCall call(op, grad_out, qkv, out, lse, head_dims, scale, mask);
  const CurrentGpu gpu(qkv, float32_parts);
  const Tensor delta = empty_float32(qkv, call.statistics());
  if (!mask) {
    vitslim::ragged_attention_backward_cuda(call.with(nullptr, delta.mutable_data_ptr<float>()),
                                            gpu);
    return {call.grad_qkv, empty_float32(qkv, {0})};
  }
  const Tensor rows =
      empty_float32(qkv, {ragged_attention_grad_mask_rows_cuda(call.shape, gpu), call.embed_dim()});
  vitslim::ragged_attention_backward_cuda(
      call.with(rows.mutable_data_ptr<float>(), delta.mutable_data_ptr<float>()), gpu);
  return {call.grad_qkv, column_sums(rows, 0, call.embed_dim(), rows, gpu)};
}
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(vitslim_native, m) {
  m.def(
      "ragged_attention_forward(Tensor qkv, int[] head_dims, float scale, Tensor? mask,"
      " int float32_parts=3) -> (Tensor, Tensor)");
  m.def(
      "ragged_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse,"
      " int[] head_dims, float scale, Tensor? mask, int float32_parts=3) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vitslim_native, CPU, m) {
  m.impl("ragged_attention_forward", TORCH_BOX(&ragged_attention_forward_cpu));
  m.impl("ragged_attention_backward", TORCH_BOX(&ragged_attention_backward_cpu));
}

#ifdef VITSLIM_CUDA
STABLE_TORCH_LIBRARY_IMPL(vitslim_native, CUDA, m) {
  m.impl("ragged_attention_forward", TORCH_BOX(&ragged_attention_forward_cuda));
  m.impl("ragged_attention_backward", TORCH_BOX(&ragged_attention_backward_cuda));
}
#endif

}  // namespace
}  // namespace vitslim::binding
