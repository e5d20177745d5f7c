#include "../peak.h"

#include <chrono>

#include "packed_linear_kernels.h"

namespace vitslim {

double multiply_add_rate(double seconds) {
  using Clock = std::chrono::steady_clock;
  const auto multiply_adds = packed_linear_kernels().multiply_adds;
  const auto since = [](Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  // The best of short turns, so that what interrupts one does not count.
  constexpr int64_t STEPS = 20000;
  const Clock::time_point begin = Clock::now();
  double best = 0;
  do {
    const Clock::time_point turn = Clock::now();
    const double done = double(multiply_adds(STEPS));
    const double rate = done / since(turn);
    best = rate > best ? rate : best;
  } while (since(begin) < seconds);
  return best;
}

}  // namespace vitslim
