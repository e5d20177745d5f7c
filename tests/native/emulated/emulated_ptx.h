// Runs CUDA kernels on a CPU: all threads of a block (threads.h), one block after the other, and
// every instruction of csrc/cuda/ptx.cuh by its documented meaning.
//
// It is stricter than a GPU. Shared memory has exactly the size that was asked for and starts as
// NaN; asynchronous copies arrive when they are waited for and not before; products are exact and
// then cut off to float32, which is less than tensor cores keep; a barrier that some thread never
// reaches ends the program. Sanitizers see what they see in any program.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "threads.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// The runtime, as far as csrc/cuda asks it.
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulated {

// What a test may change.
struct Machine {
  int processors = 4;
  int shared_memory = 166912;  // bytes a block; an A100's
};
inline Machine machine;
inline cudaError_t last_error = cudaSuccess;
inline int64_t launches = 0;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Holds its threads until all have come; the last to come does the work of all before they go on.
class Meeting {
 public:
  explicit Meeting(int threads) : threads_(threads) {}

  template <typename Work>
  void meet(const Work& work) {
    std::unique_lock lock(mutex_);
    if (++here_ + gone_ == threads_) {
      if (gone_ > 0) fail();
      work();
      here_ = 0;
      ++phase_;
      all_here_.notify_all();
      return;
    }
    all_here_.wait(lock, [this, phase = phase_] { return phase_ != phase; });
  }

  // A thread of this meeting has returned from the kernel.
  void leave() {
    const std::lock_guard lock(mutex_);
    if (++gone_ + here_ == threads_ && here_ > 0) fail();
  }

 private:
  [[noreturn]] static void fail() {
    std::fputs("a thread left the kernel while others of it wait at a barrier\n", stderr);
    std::abort();
  }

  Mutex mutex_;
  Condition all_here_;
  const int threads_;
  int here_ = 0, gone_ = 0;
  int64_t phase_ = 0;
};

struct Warp {
  explicit Warp(int lanes) : meeting(lanes) {}
  Meeting meeting;
  void* arguments[32][4] = {};  // what every lane brings to an instruction of the whole warp
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  Index thread, block, threads, blocks;
  int lane;
  Warp* warp;
  Meeting* all;
  unsigned char* shared_memory;
  std::vector<std::vector<Copy>> copies{1};  // groups of them, the last one still open
};

// An instruction that all lanes of a warp carry out together, each with its own arguments.
template <typename Work, typename... Arguments>
void together(const Work& work, Arguments*... arguments) {
  void* own[] = {const_cast<void*>(static_cast<const void*>(arguments))...};
  std::copy(std::begin(own), std::end(own), self->warp->arguments[self->lane]);
  self->warp->meeting.meet([&] { work(self->warp->arguments); });
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared_memory,
            const Arguments&... arguments) {
  ++launches;
  if (threads % 32 || threads > 1024 || int64_t(shared_memory) > machine.shared_memory) {
    last_error = cudaErrorInvalidValue;
    return;
  }
  for (unsigned block = 0; block < blocks; ++block) {
    Meeting all(threads);
    std::vector<std::unique_ptr<Warp>> warps;
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>(32));
    // Its end lies on the end of a heap block, for a sanitizer to see what is read beyond.
    const size_t size = (shared_memory + 127) / 128 * 128;
    std::unique_ptr<unsigned char, decltype(&std::free)> memory(
        static_cast<unsigned char*>(std::aligned_alloc(128, std::max<size_t>(size, 128))),
        &std::free);
    std::memset(memory.get(), 0xff, std::max<size_t>(size, 128));
    run_threads(threads, [&](unsigned i) {
      Thread here{{i},  {block},     {threads}, {blocks}, int(i % 32), warps[i / 32].get(),
                  &all, memory.get()};
      self = &here;
      kernel(Parameters(arguments)...);
      here.warp->meeting.leave();
      all.leave();
    });
  }
}

inline float cut_off(double x) {
  float y = float(x);
  if (std::isfinite(y) && std::abs(double(y)) > std::abs(x)) y = std::nextafter(y, 0.0f);
  return y;
}

inline float flushed(float x) { return std::abs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline float half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float size = exponent == 31 ? (fraction ? NAN : INFINITY)
               : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                              : std::ldexp(float(fraction), -24);
  return bits >> 15 ? -size : size;
}

inline uint16_t half_bits(float x) {
  const uint16_t sign = std::bit_cast<uint32_t>(x) >> 31 << 15;
  const float size = std::abs(x);
  if (std::isnan(x)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size == 0) return sign;
  // nearbyint rounds to nearest, ties to even; the unit is that of the exponent, or a subnormal's.
  // A first digit that is there adds one to the exponent's field, as it must.
  int exponent = 0;
  std::frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);
  return sign | (((unit + 24) << 10) + int(std::nearbyint(std::ldexp(size, -unit))));
}

}  // namespace emulated

#define threadIdx (emulated::self->thread)
#define blockIdx (emulated::self->block)
#define blockDim (emulated::self->threads)
#define gridDim (emulated::self->blocks)

inline cudaError_t cudaGetDevice(int* index) { return *index = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulated::machine.processors
                                                       : emulated::machine.shared_memory;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, int, int bytes) {
  return bytes > emulated::machine.shared_memory ? cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(emulated::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}

inline void __syncthreads() {
  emulated::self->all->meet([] {});
}
inline void __syncwarp() {
  emulated::self->warp->meeting.meet([] {});
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  T received;
  emulated::together(
      [&](void*(&lanes)[32][4]) {
        for (auto& lane : lanes) {
          const int from = int(&lane - lanes) ^ *static_cast<int*>(lane[2]);
          *static_cast<T*>(lane[1]) = *static_cast<T*>(lanes[from][0]);
        }
      },
      &value, &received, &mask);
  return received;
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  T received;
  emulated::together(
      [&](void*(&lanes)[32][4]) {
        for (auto& lane : lanes)
          *static_cast<T*>(lane[1]) = *static_cast<T*>(lanes[*static_cast<int*>(lane[2]) & 31][0]);
      },
      &value, &received, &source);
  return received;
}

namespace vitslim {

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(Half x) { return emulated::half_value(x.bits); }

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Half from_float<Half>(float x) {
  return {emulated::half_bits(x)};
}

template <typename T>
uint32_t pack(float low, float high) {
  return uint32_t(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
}

inline float exp2_fast(float x) {
  return emulated::flushed(emulated::cut_off(std::exp2(double(emulated::flushed(x)))));
}
inline float reciprocal_fast(float x) {
  return emulated::flushed(emulated::cut_off(1.0 / double(emulated::flushed(x))));
}

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emulated::together(
      [](void*(&lanes)[32][4]) {
        const auto half = [](uint32_t pair, int which) {
          return double(to_float(T{uint16_t(pair >> 16 * which)}));
        };
        for (int row = 0; row < 16; ++row)
          for (int column = 0; column < 8; ++column) {
            float& sum =
                static_cast<float*>(lanes[row % 8 * 4 + column / 2][0])[row / 8 * 2 + column % 2];
            double exact = 0;
            for (int k = 0; k < 16; ++k)
              exact += half(static_cast<uint32_t*>(
                                lanes[row % 8 * 4 + k % 8 / 2][1])[row / 8 + k / 8 * 2],
                            k % 2) *
                       half(static_cast<uint32_t*>(lanes[column * 4 + k % 8 / 2][2])[k / 8], k % 2);
            sum = emulated::cut_off(double(sum) + exact);
          }
      },
      &d, &a, &b);
}

namespace emulated_detail {
inline void load_matrices(uint32_t (&matrices)[4], const void* row, bool transposed) {
  ::emulated::together(
      [transposed](void*(&lanes)[32][4]) {
        uint16_t all[4][8][8];
        for (int i = 0; i < 32; ++i) {
          if (reinterpret_cast<uintptr_t>(lanes[i][1]) % 16) {
            std::fputs("ldmatrix: an address is not a multiple of 16\n", stderr);
            std::abort();
          }
          std::memcpy(all[i / 8][i % 8], lanes[i][1], 16);
        }
        for (int i = 0; i < 32; ++i)
          for (int m = 0; m < 4; ++m) {
            const int r = i / 4, c = i % 4 * 2;
            const uint16_t low = transposed ? all[m][c][r] : all[m][r][c];
            const uint16_t high = transposed ? all[m][c + 1][r] : all[m][r][c + 1];
            static_cast<uint32_t*>(lanes[i][0])[m] = uint32_t(high) << 16 | low;
          }
      },
      &matrices, static_cast<const unsigned char*>(row));
}
}  // namespace emulated_detail

inline void ldmatrix(uint32_t (&matrices)[4], const void* row) {
  emulated_detail::load_matrices(matrices, row, false);
}
inline void ldmatrix_transposed(uint32_t (&matrices)[4], const void* row) {
  emulated_detail::load_matrices(matrices, row, true);
}

inline void copy_async(void* shared, const void* global, int bytes) {
  if (bytes < 0 || bytes > 16 || reinterpret_cast<uintptr_t>(shared) % 16 ||
      (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 16)) {
    std::fputs("copy_async: an address is not a multiple of 16, or not 0 to 16 bytes\n", stderr);
    std::abort();
  }
  ::emulated::self->copies.back().push_back({shared, global, bytes});
}
inline void copy_async_commit() { ::emulated::self->copies.emplace_back(); }
template <int PENDING>
void copy_async_wait() {
  auto& groups = ::emulated::self->copies;
  const size_t arrived = groups.size() - 1 > PENDING ? groups.size() - 1 - PENDING : 0;
  for (size_t i = 0; i < arrived; ++i)
    for (const ::emulated::Copy& copy : groups[i]) {
      std::memset(copy.to, 0, 16);
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    }
  groups.erase(groups.begin(), groups.begin() + int64_t(arrived));
}

template <typename T>
T anew(T x) {
  return x;
}

inline unsigned char* shared_memory() { return ::emulated::self->shared_memory; }

}  // namespace vitslim
