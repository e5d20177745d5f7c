// The GPU that a tensor is on, and what the ops for it share.

#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../column_sums.h"
#include "../gpu.h"
#include "tensor.h"

namespace vitslim::binding {

// Torch's current stream on a device. torch's CUDA library is asked by name, once it is loaded:
// linked against it, this module could not be loaded beside a torch without CUDA.
inline void* current_stream(int32_t device) {
  using Ask = int32_t (*)(int32_t device, void** stream);
  static const Ask ask = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? Ask(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  require(ask != nullptr && ask(device, &stream) == 0,
          "vitslim: this torch does not tell its current CUDA stream, which the native kernels"
          " need; use another backend, vitslim.use_backend(\"reference\").");
  return stream;
}

// Makes a tensor's GPU the current one for as long as this lives. What is allocated meanwhile comes
// from torch's cache, so that a CUDA graph can capture all of it.
class CurrentGpu {
 public:
  explicit CurrentGpu(const Tensor& x, int64_t float32_parts = 3)
      : guard_(x.get_device_index()),
        gpu_{current_stream(x.get_device_index()), int(float32_parts)} {}

  operator const Gpu&() const { return gpu_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Gpu gpu_;
};

// The sums of `columns` columns of a contiguous float32 matrix, from column `first` on, in the
// dtype of `like`.
inline Tensor column_sums(const Tensor& matrix, int64_t first, int64_t columns, const Tensor& like,
                          const Gpu& gpu) {
  Tensor sums = empty(like, {columns});
  column_sums_cuda({matrix.const_data_ptr<float>() + first, matrix.size(0), columns, matrix.size(1),
                    sums.mutable_data_ptr(), dtype_of("column_sums", "the sums", like)},
                   gpu);
  return sums;
}

}  // namespace vitslim::binding
