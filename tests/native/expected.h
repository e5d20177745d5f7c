// What the reference says of a result, and how far from it a kernel may be.

#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "reference.h"

namespace stress {

struct Expected {
  std::vector<double> values;
  double budget;
};

// Of the largest number of the result.
constexpr double TINY = 2e-6;
// 16 rounding errors of float32, and one of bfloat16.
constexpr Noise FLOAT32_NOISE = {0x1p-20, 0x1p-20}, BFLOAT16_NOISE = {0x1p-20, 0x1p-9};
constexpr int DISTURBED_RUNS = 3;

// run(reference) computes the result, a Matrix.
template <typename Run>
Expected expect(bool bfloat16_products, Noise noise, uint64_t seed, const Run& run) {
  Reference exact(bfloat16_products, {}, 0);
  Expected expected{run(exact).values, 0};
  double largest = 0, change = 0;
  for (const double value : expected.values)
    if (std::isfinite(value)) largest = std::max(largest, std::abs(value));
  for (int i = 0; i < DISTURBED_RUNS; ++i) {
    Reference disturbed(bfloat16_products, noise, seed + i);
    const std::vector<double> values = run(disturbed).values;
    for (size_t j = 0; j < values.size(); ++j) {
      const double difference = std::abs(values[j] - expected.values[j]);
      if (std::isfinite(difference)) change = std::max(change, difference);
    }
  }
  // Twice, because a few random disturbances are not the worst there are: a softmax of large
  // logits reached 1.03 times their change on code without fused multiply-adds. Below the smallest
  // normal number float32 has no relative precision.
  expected.budget = TINY * largest + 2 * change + FLT_MIN;
  return expected;
}

// Returns the largest error as a part of the budget; throws where it is more than all of it, or
// where one is NaN or infinite and the other not.
inline double error_of(const float* actual, const Expected& expected) {
  double worst = 0;
  for (size_t i = 0; i < expected.values.size(); ++i) {
    const double exact = expected.values[i], error = std::abs(actual[i] - exact);
    bool good = error <= expected.budget;
    if (std::isnan(exact)) good = std::isnan(actual[i]);
    if (std::abs(exact) > FLT_MAX) good = std::isinf(actual[i]) && (actual[i] > 0) == (exact > 0);
    if (!good) {
      std::ostringstream text;
      text.precision(9);
      text << "element " << i << " of " << expected.values.size() << " is " << actual[i]
           << ", expected " << exact << " within " << expected.budget;
      throw std::runtime_error(text.str());
    }
    if (std::isfinite(exact)) worst = std::max(worst, error / expected.budget);
  }
  return worst;
}

// Whether two results are the same to the last bit; all NaN count as one.
inline bool same_bits(const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (a[i] != b[i] || std::signbit(a[i]) != std::signbit(b[i])) return false;
  }
  return true;
}

inline void require(bool condition, const std::string& otherwise) {
  if (!condition) throw std::runtime_error(otherwise);
}

}  // namespace stress
