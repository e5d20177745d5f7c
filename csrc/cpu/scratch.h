// Memory that a thread keeps from call to call: to map and clear fresh pages would cost as much as
// a small head.

#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace vitslim {

// Returns at least `floats` floats, on a cache line of their own, that belong to the calling thread
// until it asks again.
float* thread_scratch(int64_t floats);

namespace {

// Hands out pieces of such memory, each on a cache line of its own. Without memory it only adds up
// how much will be needed.
class Carver {
 public:
  explicit Carver(float* memory) : memory_(memory) {}
  float* take(int64_t floats) {
    float* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += (floats + 15) / 16 * 16;
#if defined(__SANITIZE_ADDRESS__)
    // A gap that nobody may touch shows what reaches beyond its piece.
    constexpr int64_t GAP = 64;
    if (memory_) __asan_unpoison_memory_region(piece, (memory_ + used_ - piece) * sizeof(float));
    if (memory_) __asan_poison_memory_region(memory_ + used_, GAP * sizeof(float));
    used_ += GAP;
#endif
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace vitslim
