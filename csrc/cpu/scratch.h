// Memory that a thread keeps from call to call: to map and clear fresh pages would cost as much as
// a small head.

#pragma once

#include <cstdint>

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
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace vitslim
