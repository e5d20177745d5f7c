// vitslim._C: the only file that knows both torch and the kernels.
//
// It registers the ops in the library `vitslim_native`, through torch's stable ABI so that one
// build loads under any torch from 2.11 on, checks their arguments, and hands pointers and strides
// to the kernels. The Python module itself only tells what was built and which instruction set
// runs.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "packed_linear.h"
#include "peak.h"
#include "ragged_attention.h"
#include "vit_encoder.h"

#ifndef VITSLIM_SANITIZE
#define VITSLIM_SANITIZE ""
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using vitslim::DType;

vitslim::Threads torch_threads() {
  const auto run = [](int64_t count, vitslim::ParallelBody body, void* context) {
    torch::stable::parallel_for(0, count, 1,
                                [&](int64_t begin, int64_t end) { body(begin, end, context); });
  };
  return {int64_t(torch::stable::get_num_threads()), run};
}

// Throws one sentence where a condition fails. STD_TORCH_CHECK would put the path of this file on
// the machine that built it in front.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

std::string shape_text(const Tensor& x) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < x.dim(); ++i) text << (i ? ", " : "") << x.size(i);
  text << "]";
  return text.str();
}

DType dtype_of(const Tensor& x, const char* op) {
  const ScalarType type = x.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
          ": qkv must be float32, bfloat16 or float16 for the native backend.");
  return type == ScalarType::Float      ? DType::FLOAT32
         : type == ScalarType::BFloat16 ? DType::BFLOAT16
                                        : DType::FLOAT16;
}

// The kernels take any stride between images and tokens, but want columns side by side.
Tensor with_unit_columns(const Tensor& x) {
  return x.size(2) < 2 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

// Checks of both directions, and the part of the call that they share.
struct Call {
  std::vector<int64_t> head_offsets;
  Tensor qkv;
  std::optional<Tensor> mask;
  vitslim::RaggedAttentionShape shape;

  Call(const char* op, const Tensor& qkv_in, const std::vector<int64_t>& head_dims, double scale,
       const std::optional<Tensor>& mask_in)
      : head_offsets{0}, qkv(qkv_in) {
    for (const int64_t width : head_dims) {
      require(width >= 0, op, ": head_dims has the negative width ", width, ".");
      head_offsets.push_back(head_offsets.back() + width);
    }
    const int64_t embed_dim = head_offsets.back();
    require(qkv.dim() == 3 && qkv.size(2) == 3 * embed_dim, op,
            ": qkv must have the shape [batch, tokens, 3 * sum(head_dims) = ", 3 * embed_dim,
            "], but has ", shape_text(qkv), ".");
    const DType dtype = dtype_of(qkv, op);
    if (mask_in) {
      require(mask_in->dim() == 1 && mask_in->size(0) == embed_dim, op,
              ": mask must have the shape [sum(head_dims) = ", embed_dim, "], but has ",
              shape_text(*mask_in), ".");
      require(mask_in->scalar_type() == ScalarType::Float && mask_in->is_cpu(), op,
              ": mask must be float32 on the CPU.");
      mask = torch::stable::contiguous(*mask_in);
    }
    qkv = with_unit_columns(qkv);
    shape = {qkv.size(0),         qkv.size(1),  int64_t(head_dims.size()),
             head_offsets.data(), float(scale), dtype,
             qkv.stride(0),       qkv.stride(1)};
  }
  Call(const Call&) = delete;

  int64_t embed_dim() const { return head_offsets.back(); }
  const float* mask_data() const { return mask ? mask->const_data_ptr<float>() : nullptr; }
};

Tensor empty_float32(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

std::tuple<Tensor, Tensor> ragged_attention_forward_cpu(const Tensor& qkv,
                                                        std::vector<int64_t> head_dims,
                                                        double scale, std::optional<Tensor> mask) {
  const Call call("ragged_attention_forward", qkv, head_dims, scale, mask);
  const vitslim::RaggedAttentionShape& shape = call.shape;
  Tensor out = torch::stable::new_empty(
      qkv, std::vector<int64_t>{shape.batch, shape.tokens, call.embed_dim()});
  Tensor lse = empty_float32(qkv, std::vector<int64_t>{shape.batch, shape.heads, shape.tokens});
  vitslim::ragged_attention_forward_cpu({shape, call.qkv.const_data_ptr(), call.mask_data(),
                                         out.mutable_data_ptr(), lse.mutable_data_ptr<float>()},
                                        torch_threads());
  return {out, lse};
}

std::tuple<Tensor, Tensor> ragged_attention_backward_cpu(const Tensor& grad_out, const Tensor& qkv,
                                                         const Tensor& out, const Tensor& lse,
                                                         std::vector<int64_t> head_dims,
                                                         double scale, std::optional<Tensor> mask) {
  const char* op = "ragged_attention_backward";
  const Call call(op, qkv, head_dims, scale, mask);
  const vitslim::RaggedAttentionShape& shape = call.shape;
  const int64_t embed_dim = call.embed_dim();
  const std::pair<const char*, const Tensor*> like_out[] = {{"grad_out", &grad_out}, {"out", &out}};
  for (const auto& [name, tensor] : like_out) {
    require(tensor->dim() == 3 && tensor->size(0) == shape.batch &&
                tensor->size(1) == shape.tokens && tensor->size(2) == embed_dim,
            op, ": ", name, " must have the shape [", shape.batch, ", ", shape.tokens, ", ",
            embed_dim, "], but has ", shape_text(*tensor), ".");
    require(tensor->scalar_type() == qkv.scalar_type() && tensor->is_cpu(), op, ": ", name,
            " must have the dtype and device of qkv.");
  }
  require(lse.dim() == 3 && lse.size(0) == shape.batch && lse.size(1) == shape.heads &&
              lse.size(2) == shape.tokens && lse.scalar_type() == ScalarType::Float && lse.is_cpu(),
          op, ": lse must be float32 with the shape [", shape.batch, ", ", shape.heads, ", ",
          shape.tokens, "], but has ", shape_text(lse), ".");

  const Tensor grad = with_unit_columns(grad_out);
  const Tensor packed_out = torch::stable::contiguous(out);
  const Tensor packed_lse = torch::stable::contiguous(lse);
  Tensor grad_qkv =
      torch::stable::new_empty(qkv, std::vector<int64_t>{shape.batch, shape.tokens, 3 * embed_dim});
  Tensor grad_mask_rows = empty_float32(
      qkv, std::vector<int64_t>{call.mask ? shape.batch : 0, call.mask ? embed_dim : 0});
  vitslim::ragged_attention_backward_cpu(
      {shape, grad.const_data_ptr(), grad.stride(0), grad.stride(1), call.qkv.const_data_ptr(),
       packed_out.const_data_ptr(), packed_lse.const_data_ptr<float>(), call.mask_data(),
       grad_qkv.mutable_data_ptr(), grad_mask_rows.mutable_data_ptr<float>()},
      torch_threads());

  if (!call.mask) return {grad_qkv, empty_float32(qkv, std::vector<int64_t>{0})};
  // Images are added up here, in order, so that the sum is the same for any number of threads.
  Tensor grad_mask = empty_float32(qkv, std::vector<int64_t>{embed_dim});
  const float* rows = grad_mask_rows.const_data_ptr<float>();
  float* sums = grad_mask.mutable_data_ptr<float>();
  for (int64_t c = 0; c < embed_dim; ++c) {
    double sum = 0;
    for (int64_t image = 0; image < shape.batch; ++image) sum += rows[image * embed_dim + c];
    sums[c] = float(sum);
  }
  return {grad_qkv, grad_mask};
}

void require_float32(const Tensor& x, int64_t dim, const char* op, const char* name) {
  require(x.scalar_type() == ScalarType::Float && x.is_cpu() && x.dim() == dim, op, ": ", name,
          " must be float32 on the CPU with ", dim, " dimensions, but has the shape ",
          shape_text(x), " or another dtype or device.");
}

DType dtype_of_panels(const Tensor& panels, bool bfloat16_products, const char* op) {
  const ScalarType type = panels.scalar_type();
  require((type == ScalarType::Float || type == ScalarType::BFloat16) && panels.is_cpu() &&
              panels.dim() == 1,
          op, ": panels must be a float32 or bfloat16 vector on the CPU.");
  require(!bfloat16_products || type == ScalarType::BFloat16, op,
          ": bfloat16 products need bfloat16 panels.");
  return type == ScalarType::Float ? DType::FLOAT32 : DType::BFLOAT16;
}

vitslim::Activation activation_of(const std::string& name) {
  const char* names[] = {"none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu"};
  for (int64_t i = 0; i < vitslim::ACTIVATION_COUNT; ++i)
    if (name == names[i]) return vitslim::Activation(i);
  throw std::runtime_error("packed_linear: no activation is called '" + name + "'.");
}

// x, y and the residual are matrices here: [rows, columns].
Tensor packed_linear_forward_cpu(const Tensor& x_in, const Tensor& panels_in,
                                 std::optional<Tensor> bias, int64_t out, std::string activation,
                                 std::optional<Tensor> residual, std::optional<Tensor> scale,
                                 std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                                 double norm_eps, bool bfloat16_products) {
  const char* op = "packed_linear";
  require_float32(x_in, 2, op, "x");
  const Tensor x = x_in.size(1) < 2 || x_in.stride(1) == 1 ? x_in : torch::stable::contiguous(x_in);
  const int64_t rows = x.size(0), in = x.size(1);
  const DType dtype = dtype_of_panels(panels_in, bfloat16_products, op);
  const Tensor panels = torch::stable::contiguous(panels_in);
  require(out >= 0 && out <= (int64_t(1) << 31) && in <= (int64_t(1) << 31) &&
              panels.size(0) == vitslim::panel_elements(in, out, dtype),
          op, ": panels of ", panels.size(0), " elements do not hold a weight of ", out, " x ", in,
          ".");
  const auto vector = [&](std::optional<Tensor>& given, int64_t size,
                          const char* name) -> const float* {
    if (!given) return nullptr;
    require_float32(*given, 1, op, name);
    require(given->size(0) == size, op, ": ", name, " must have ", size, " elements, but has ",
            given->size(0), ".");
    given = torch::stable::contiguous(*given);
    return given->const_data_ptr<float>();
  };
  vitslim::PackedLinear call{};
  call.x = x.const_data_ptr<float>();
  const vitslim::LayerNorm norm{vector(norm_weight, in, "norm_weight"),
                                vector(norm_bias, in, "norm_bias"), float(norm_eps)};
  require(!norm.weight == !norm.bias, op, ": norm_weight and norm_bias go together.");
  call.norm = norm.weight ? &norm : nullptr;
  call.weight = {panels.const_data_ptr(), dtype, bfloat16_products, in, out};
  call.bias = vector(bias, out, "bias");
  call.activation = activation_of(activation);
  if (residual) {
    require_float32(*residual, 2, op, "residual");
    require(residual->size(0) == rows && residual->size(1) == out, op,
            ": residual must have the shape [", rows, ", ", out, "], but has ",
            shape_text(*residual), ".");
    residual = torch::stable::contiguous(*residual);
    call.residual = residual->const_data_ptr<float>();
  }
  require(residual || !scale, op, ": scale needs a residual.");
  call.scale = vector(scale, out, "scale");
  Tensor y = empty_float32(x, {rows, out});
  call.y = y.mutable_data_ptr<float>();
  call.rows = rows;
  call.x_stride = x.stride(0);
  call.residual_stride = call.y_stride = out;
  vitslim::packed_linear_cpu(call, torch_threads());
  return y;
}

Tensor vit_encoder_forward_cpu(const Tensor& images_in, const Tensor& start_in,
                               const Tensor& vectors_in, const Tensor& panels_in,
                               const Tensor& layout_in, int64_t rows, bool bfloat16_products) {
  const char* op = "vit_encoder";
  require_float32(images_in, 4, op, "images");
  require_float32(start_in, 2, op, "start");
  require_float32(vectors_in, 1, op, "vectors");
  require(layout_in.scalar_type() == ScalarType::Long && layout_in.is_cpu() && layout_in.dim() == 1,
          op, ": layout must be an int64 vector on the CPU.");
  require(rows >= 0 && rows <= start_in.size(0), op, ": rows is ", rows, ", but start has ",
          start_in.size(0), " tokens.");
  const DType dtype = dtype_of_panels(panels_in, bfloat16_products, op);
  const Tensor images = torch::stable::contiguous(images_in);
  const Tensor start = torch::stable::contiguous(start_in);
  const Tensor vectors = torch::stable::contiguous(vectors_in);
  const Tensor panels = torch::stable::contiguous(panels_in);
  const Tensor layout = torch::stable::contiguous(layout_in);
  Tensor out = empty_float32(images, {images.size(0), rows, start.size(1)});
  vitslim::vit_encoder_cpu(
      {images.const_data_ptr<float>(), images.size(0), images.size(1), images.size(2),
       images.size(3), start.const_data_ptr<float>(), start.size(0), start.size(1),
       vectors.const_data_ptr<float>(), vectors.size(0), panels.const_data_ptr(), dtype,
       bfloat16_products, panels.size(0), layout.const_data_ptr<int64_t>(), layout.size(0),
       out.mutable_data_ptr<float>(), rows},
      torch_threads());
  return out;
}

STABLE_TORCH_LIBRARY(vitslim_native, m) {
  m.def(
      "ragged_attention_forward(Tensor qkv, int[] head_dims, float scale, Tensor? mask)"
      " -> (Tensor, Tensor)");
  m.def(
      "ragged_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse,"
      " int[] head_dims, float scale, Tensor? mask) -> (Tensor, Tensor)");
  m.def(
      "packed_linear_forward(Tensor x, Tensor panels, Tensor? bias, int out_features,"
      " str activation, Tensor? residual, Tensor? scale, Tensor? norm_weight, Tensor? norm_bias,"
      " float norm_eps, bool bfloat16_products) -> Tensor");
  m.def(
      "vit_encoder_forward(Tensor images, Tensor start, Tensor vectors, Tensor panels,"
      " Tensor layout, int rows, bool bfloat16_products) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vitslim_native, CPU, m) {
  m.impl("ragged_attention_forward", TORCH_BOX(&ragged_attention_forward_cpu));
  m.impl("ragged_attention_backward", TORCH_BOX(&ragged_attention_backward_cpu));
  m.impl("packed_linear_forward", TORCH_BOX(&packed_linear_forward_cpu));
  m.impl("vit_encoder_forward", TORCH_BOX(&vit_encoder_forward_cpu));
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (int i = vitslim::ISA_COUNT - 1; i >= 0; --i)
    if (vitslim::isa_available(vitslim::Isa(i))) names.push_back(isa_name(vitslim::Isa(i)));
  return names;
}

void set_instruction_set(const std::string& name) {
  for (int i = 0; i < vitslim::ISA_COUNT; ++i) {
    const vitslim::Isa isa = vitslim::Isa(i);
    if (name == isa_name(isa) && isa_available(isa)) return set_current_isa(isa);
  }
  std::string names;
  for (const std::string& available : instruction_sets())
    names += (names.empty() ? "" : ", ") + available;
  throw std::invalid_argument("instruction set '" + name + "' is not available here; there are " +
                              names + ".");
}

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
#ifdef VITSLIM_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["sanitizers"] = VITSLIM_SANITIZE;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "vitslim's native kernels; use vitslim.native, which imports torch first.";
  m.def("build_info", &build_info, "The compiler, and whether CUDA and sanitizers are in.");
  m.def(
      "num_threads", [] { return torch::stable::get_num_threads(); },
      "How many threads torch lends to a kernel.");
  m.def("instruction_sets", &instruction_sets, "What this machine can run, best first.");
  m.def(
      "instruction_set", [] { return std::string(isa_name(vitslim::current_isa())); },
      "What the CPU kernels use now.");
  m.def("set_instruction_set", &set_instruction_set, pybind11::arg("name"),
        "Makes the CPU kernels use one of instruction_sets(), for tests.");
  m.def("multiply_add_rate", &vitslim::multiply_add_rate, pybind11::arg("seconds"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Multiply-adds a second of one thread on registers alone.");
}
