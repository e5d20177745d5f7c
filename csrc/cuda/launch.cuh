// Starts a kernel: the grid, its shared memory, and an error that names the kernel and the shape.

#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../gpu.h"
#include "ptx.cuh"

#ifndef VITSLIM_EMULATED
#include <cuda_runtime.h>
#endif

namespace vitslim {

// What the current device has.
struct Device {
  int processors;         // streaming multiprocessors
  int64_t shared_memory;  // bytes that one block may have
};

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + ".");
}

// Attributes are read at every call: the runtime keeps them, and another device may be current.
inline Device current_device() {
  int index = 0, processors = 0, bytes = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index),
        "the number of multiprocessors");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
        "the size of shared memory");
  return {processors, bytes};
}

struct Grid {
  int64_t blocks;
  int threads;            // a multiple of 32
  int64_t shared_memory;  // bytes
};

// Launches kernel(args...) on the stream. Nothing is waited for and nothing allocated, so that a
// CUDA graph can capture it. `describe` writes the shape into the sentence of an error.
template <typename Describe, typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, const Gpu& gpu,
            Describe describe, const Arguments&... arguments) {
  if (grid.blocks == 0) return;
  cudaError_t error = cudaSuccess;
  if (grid.blocks > INT32_MAX) error = cudaErrorInvalidConfiguration;
  // Up to 48 KiB of shared memory come without asking.
  if (error == cudaSuccess && grid.shared_memory > 48 * 1024)
    error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_memory));
  if (error == cudaSuccess) {
#ifdef VITSLIM_EMULATED
    emulated::launch(kernel, unsigned(grid.blocks), unsigned(grid.threads),
                     size_t(grid.shared_memory), arguments...);
#else
    kernel<<<unsigned(grid.blocks), grid.threads, size_t(grid.shared_memory),
             static_cast<cudaStream_t>(gpu.stream)>>>(arguments...);
#endif
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return;
  std::ostringstream sentence;
  sentence << name << " failed to start on " << grid.blocks << " blocks of " << grid.threads
           << " threads with " << grid.shared_memory << " bytes of shared memory (";
  describe(sentence);
  sentence << "): " << cudaGetErrorString(error) << ".";
  throw std::runtime_error(sentence.str());
}

}  // namespace vitslim
