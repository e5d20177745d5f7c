// What every op asks of its tensors, through torch's stable ABI: one build loads under any torch
// from 2.11 on. Only module.cpp and this folder know torch.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../activation.h"
#include "../dtype.h"
#include "../threads.h"

namespace vitslim::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Threads torch_threads() {
  const auto run = [](int64_t count, ParallelBody body, void* context) {
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

inline std::string sizes_text(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << "]";
  return text.str();
}

inline std::vector<int64_t> sizes_of(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return sizes;
}

inline std::string shape_text(const Tensor& x) { return sizes_text(sizes_of(x)); }

// Of the types that the kernels take.
inline const char* type_text(ScalarType type) {
  return type == ScalarType::Float ? "float32" : type == ScalarType::Half ? "float16" : "bfloat16";
}

inline bool same_device(const Tensor& x, const Tensor& y) {
  return x.is_cpu() == y.is_cpu() && x.is_cuda() == y.is_cuda() &&
         x.get_device_index() == y.get_device_index();
}

// Checks that a tensor has the sizes and the type, and is where x is.
inline void require_like(const char* op, const char* name, const Tensor& tensor,
                         const std::vector<int64_t>& sizes, ScalarType type, const Tensor& x) {
  require(sizes_of(tensor) == sizes, op, ": ", name, " must have the shape ", sizes_text(sizes),
          ", but has ", shape_text(tensor), ".");
  require(tensor.scalar_type() == type, op, ": ", name, " must be ", type_text(type), ".");
  require(same_device(tensor, x), op, ": ", name, " must be on the input's device.");
}

inline DType dtype_of(const char* op, const char* name, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op,
          ": ", name, " must be float32, bfloat16 or float16 for the native backend.");
  return type == ScalarType::Float      ? DType::FLOAT32
         : type == ScalarType::BFloat16 ? DType::BFLOAT16
                                        : DType::FLOAT16;
}

inline Activation activation_of(const char* op, const std::string& name) {
  const char* names[] = {"none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu"};
  for (int64_t i = 0; i < ACTIVATION_COUNT; ++i)
    if (name == names[i]) return Activation(i);
  throw std::runtime_error(std::string(op) + ": no activation is called '" + name + "'.");
}

// The kernels take any stride between rows, but want columns side by side.
inline Tensor with_unit_columns(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) < 2 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes);
}

inline Tensor empty_float32(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

// A float32 vector of such a size on x's device, or none. It comes back contiguous.
inline std::optional<Tensor> vector_or_none(const char* op, const char* name,
                                            const std::optional<Tensor>& vector, int64_t size,
                                            const Tensor& x) {
  if (!vector) return std::nullopt;
  require_like(op, name, *vector, {size}, ScalarType::Float, x);
  return torch::stable::contiguous(*vector);
}

inline const float* data_or_null(const std::optional<Tensor>& vector) {
  return vector ? vector->const_data_ptr<float>() : nullptr;
}

}  // namespace vitslim::binding
