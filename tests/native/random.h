// Random numbers that are the same with every compiler and library, so that a seed repeats a case.

#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>

namespace stress {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // splitmix64: neighbouring seeds give unrelated sequences.
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  double uniform() { return double(next() >> 11) * 0x1p-53; }  // [0, 1)
  double symmetric() { return 2 * uniform() - 1; }             // [-1, 1)
  bool chance(double probability) { return uniform() < probability; }
  int64_t between(int64_t low, int64_t high) {  // both ends included
    return low + int64_t(next() % uint64_t(high - low + 1));
  }
  // Up to high, more often small than large: small sizes are where the edges of tiles are.
  int64_t size(int64_t low, int64_t high) {
    return chance(0.5) ? between(low, low + (high - low) / 5) : between(low, high);
  }
  // Mean 0 and variance 1; the sum of uniform numbers is normal enough.
  double normal() {
    double sum = 0;
    for (int i = 0; i < 3; ++i) sum += symmetric();
    return sum;
  }
  template <typename T>
  T pick(std::initializer_list<T> values) {
    return values.begin()[between(0, int64_t(values.size()) - 1)];
  }

 private:
  uint64_t state_;
};

}  // namespace stress
