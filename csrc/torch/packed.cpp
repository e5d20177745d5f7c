// The ops of a packed model, on the CPU in float32: packed_linear and the whole encoder.

#include "../packed_linear.h"
#include "../vit_encoder.h"
#include "tensor.h"

namespace vitslim::binding {
namespace {

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

// x, y and the residual are matrices here: [rows, columns].
Tensor packed_linear_forward_cpu(const Tensor& x_in, const Tensor& panels_in,
                                 std::optional<Tensor> bias, int64_t out, std::string activation,
                                 std::optional<Tensor> residual, std::optional<Tensor> scale,
                                 std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                                 double norm_eps, bool bfloat16_products) {
  const char* op = "packed_linear";
  require_float32(x_in, 2, op, "x");
  const Tensor x = with_unit_columns(x_in);
  const int64_t rows = x.size(0), in = x.size(1);
  const DType dtype = dtype_of_panels(panels_in, bfloat16_products, op);
  const Tensor panels = torch::stable::contiguous(panels_in);
  require(out >= 0 && out <= (int64_t(1) << 31) && in <= (int64_t(1) << 31) &&
              panels.size(0) == panel_elements(in, out, dtype),
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
  PackedLinear call{};
  call.x = x.const_data_ptr<float>();
  const LayerNorm norm{vector(norm_weight, in, "norm_weight"), vector(norm_bias, in, "norm_bias"),
                       float(norm_eps)};
  require(!norm.weight == !norm.bias, op, ": norm_weight and norm_bias go together.");
  call.norm = norm.weight ? &norm : nullptr;
  call.weight = {panels.const_data_ptr(), dtype, bfloat16_products, in, out};
  call.bias = vector(bias, out, "bias");
  call.activation = activation_of(op, activation);
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
  packed_linear_cpu(call, torch_threads());
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
  vit_encoder_cpu({images.const_data_ptr<float>(), images.size(0), images.size(1), images.size(2),
                   images.size(3), start.const_data_ptr<float>(), start.size(0), start.size(1),
                   vectors.const_data_ptr<float>(), vectors.size(0), panels.const_data_ptr(), dtype,
                   bfloat16_products, panels.size(0), layout.const_data_ptr<int64_t>(),
                   layout.size(0), out.mutable_data_ptr<float>(), rows},
                  torch_threads());
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(vitslim_native, m) {
  m.def(
      "packed_linear_forward(Tensor x, Tensor panels, Tensor? bias, int out_features,"
      " str activation, Tensor? residual, Tensor? scale, Tensor? norm_weight, Tensor? norm_bias,"
      " float norm_eps, bool bfloat16_products) -> Tensor");
  m.def(
      "vit_encoder_forward(Tensor images, Tensor start, Tensor vectors, Tensor panels,"
      " Tensor layout, int rows, bool bfloat16_products) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vitslim_native, CPU, m) {
  m.impl("packed_linear_forward", TORCH_BOX(&packed_linear_forward_cpu));
  m.impl("vit_encoder_forward", TORCH_BOX(&vit_encoder_forward_cpu));
}

}  // namespace
}  // namespace vitslim::binding
