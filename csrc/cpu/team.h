// Threads that work on one image together and wait for each other between its steps.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vitslim {

// Members of a team arrive one by one, or several at once where one thread plays them all.
class Barrier {
 public:
  // Waits until all `members` have arrived; what they wrote before is seen after.
  void arrive(int64_t count, int64_t members) {
    const int64_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(count, std::memory_order_acq_rel) + count == members) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    // The others are microseconds away, unless something else runs on their processor.
    for (int64_t spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
      spins < 20000 ? pause() : std::this_thread::yield();
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

}  // namespace vitslim
