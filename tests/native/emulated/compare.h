// Numbers of the kernels' types as arrays, and how much they may differ from exact ones.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../../csrc/cuda/ptx.cuh"
#include "../../../csrc/dtype.h"
#include "../exact.h"
#include "../random.h"

namespace emulated {

template <typename E>
constexpr vitslim::DType DTYPE = vitslim::DType::FLOAT32;
template <>
inline constexpr vitslim::DType DTYPE<vitslim::BFloat16> = vitslim::DType::BFLOAT16;
template <>
inline constexpr vitslim::DType DTYPE<vitslim::Half> = vitslim::DType::FLOAT16;

// What a kernel may err, as a fraction of the largest exact number.
template <typename E>
constexpr double TOLERANCE = 3e-6;
template <>
inline constexpr double TOLERANCE<vitslim::BFloat16> = 1.6e-2;
template <>
inline constexpr double TOLERANCE<vitslim::Half> = 2e-3;

// An array that ends where its heap block does, filled with NaN if nothing else.
template <typename E>
stress::Exact<E> unwritten(int64_t size, int64_t shift = 0) {
  return stress::Exact<E>(size, shift, vitslim::from_float<E>(NAN));
}

template <typename E>
stress::Exact<E> random_numbers(int64_t size, stress::Random& random, double scale = 1,
                                int64_t shift = 0) {
  stress::Exact<E> numbers(size, shift);
  for (E& each : numbers) each = vitslim::from_float<E>(float(scale * random.normal()));
  return numbers;
}

template <typename E>
std::vector<double> exact(const stress::Exact<E>& numbers) {
  std::vector<double> values;
  for (const E& each : numbers) values.push_back(vitslim::to_float(each));
  return values;
}

// The largest error, as a fraction of what is allowed; throws where it is more. `size` is how large
// the answer counts as where everything cancels.
inline double require_close(const std::vector<double>& actual, const std::vector<double>& expected,
                            double tolerance, const std::string& name, double size = 1e-2) {
  double error = 0;
  for (const double each : expected) size = std::max(size, std::abs(each));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(actual.at(i) - expected[i]);
    if (!(difference <= tolerance * size)) {
      std::ostringstream sentence;
      sentence << name << "[" << i << "] is " << actual[i] << ", expected " << expected[i]
               << " within " << tolerance * size;
      throw std::runtime_error(sentence.str());
    }
    error = std::max(error, difference);
  }
  return error / (tolerance * size);
}

}  // namespace emulated
