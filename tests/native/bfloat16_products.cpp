// Products by instructions that multiply bfloat16 pairs, each kernel alone against double:
//
//   bfloat16_products KERNEL COUNT SEED
//
//   avx512-bf16, amx-bf16   what the machine has
//   amx-emulated            the unit of AMX with tiles in plain C++; needs AVX512-BF16
//   amx-portable            its product with portable vectors as well
//
// Case i has the seed SEED + i. The exit status is 1 after a failure and 77 where the machine
// cannot run the kernel; the last line says why.

#define VITSLIM_EMULATE_AMX

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/packed_linear_amx.h"
#include "expected.h"
#include "packing.h"
// Behind the product of AMX, as in its unit.
#include "../../csrc/cpu/packed_linear_beside_avx512.h"

namespace vitslim {

int64_t handed_on = 0;

// AVX512's table, which no product of bfloat16 pairs may need.
const PackedLinearKernels packed_linear_avx512 = {
    [](int64_t, int64_t, DType, bool) { return ++handed_on; },
    [](const Product&, float*) { ++handed_on; },
    [](const float*, int64_t, int64_t, int64_t, const LayerNorm&, const float*, float*, int64_t) {
      ++handed_on;
    },
    [](int64_t) { return ++handed_on; }};

// What the makefile calls the unit of AMX where it is compiled with VITSLIM_EMULATE_AMX.
extern const PackedLinearKernels packed_linear_amx_emulated;

}  // namespace vitslim

namespace stress {
namespace {

using vitslim::Activation;
using vitslim::Isa;
using vitslim::PackedLinearKernels;
using vitslim::PANEL;
using vitslim::Product;

constexpr float UNTOUCHED = 12345.0f;

// What the instructions make of a number: rounded to bfloat16, and zero below the normal ones.
double operand(float value) {
  const float rounded = rounded_to_bfloat16(value);
  return std::fpclassify(rounded) == FP_SUBNORMAL ? 0.0 : rounded;
}

struct Case {
  Random random;
  // Whole numbers, whose sums are exact in any order; many of x lie between two of bfloat16.
  bool whole, not_finite, subnormal;
  int64_t rows, begin, end, x_stride, y_stride;
  Linear linear;
  Floats residual, scale;
  Activation activation;
  bool in_place;
  Exact<float> x;

  explicit Case(uint64_t seed) : random(seed) {
    whole = random.chance(0.5);
    not_finite = random.chance(0.2);
    subnormal = random.chance(0.2);
    rows = random.size(1, 70);
    const int64_t depth = random.between(0, 130);
    begin = random.chance(0.5) ? 2 * random.between(0, 20) : 0;
    end = begin + depth;
    // A part of the sum that is not its end is whole pairs.
    linear.in = depth % 2 == 0 && random.chance(0.5) ? end + random.between(0, 40) : end;
    linear.out = random.between(1, 100);
    x_stride = depth + random.between(0, 20);
    y_stride = linear.out + random.between(0, 20);
    activation = Activation(not_finite ? 0 : random.between(0, vitslim::ACTIVATION_COUNT - 1));
    fill();
  }

  float number(int64_t limit) {
    return float(whole ? double(random.between(-limit, limit)) : random.normal());
  }

  void fill() {
    const int64_t depth = end - begin, in = linear.in, out = linear.out;
    // Whatever lies beside the part of the sum must not come in.
    linear.weight.assign(out * in, NAN);
    for (int64_t o = 0; o < out; ++o)
      for (int64_t k = begin; k < end; ++k)
        linear.weight[o * in + k] = rounded_to_bfloat16(number(8));
    x = Exact<float>((rows - 1) * x_stride + depth, random.between(0, 1), NAN);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < depth; ++k) x[r * x_stride + k] = number(1023);
    if (random.chance(0.7))
      for (int64_t o = 0; o < out; ++o) linear.bias.push_back(number(100));
    in_place = random.chance(0.3);
    if (in_place || random.chance(0.3)) {
      for (int64_t i = 0; i < rows * y_stride; ++i) residual.push_back(number(100));
      if (random.chance(0.5))
        for (int64_t o = 0; o < out; ++o) scale.push_back(random.pick({0.5f, 1.0f, 2.0f, -1.0f}));
    }
    if (depth == 0) return;
    const auto any = [&](int64_t count) { return random.between(0, count - 1); };
    if (not_finite) {
      // The largest number of float32 rounds to infinity.
      const auto some = [&] { return random.pick({NAN, INFINITY, -INFINITY, FLT_MAX}); };
      x[any(rows) * x_stride + any(depth)] = some();
      linear.weight[any(out) * in + begin + any(depth)] = rounded_to_bfloat16(some());
    }
    if (subnormal) {
      const int64_t k = any(depth);
      for (int64_t r = 0; r < rows; ++r) x[r * x_stride + k] = 1e-39f;
      for (int64_t o = 0; o < out; ++o) linear.weight[o * in + begin + k] = 0x1p126f;
    }
  }

  // y at (r, o) and how far from it any order of the sum may be.
  void expect(int64_t r, int64_t o, double* value, double* budget) const {
    double sum = 0, size = 0;
    for (int64_t k = begin; k < end; ++k) {
      const double product =
          operand(x[r * x_stride + k - begin]) * operand(linear.weight[o * linear.in + k]);
      sum += product;
      size += std::abs(product);
    }
    const double bias = linear.bias.empty() ? 0 : linear.bias[o];
    const double factor = scale.empty() ? 1 : scale[o];
    const double before = residual.empty() ? 0 : residual[r * y_stride + o];
    *value = before + factor * Reference::activated(sum + bias, int64_t(activation));
    size = std::abs(factor) * (size + std::abs(bias)) + std::abs(before);
    *budget = double(end - begin + 32) * 0x1p-24 * size + FLT_MIN;
    if (whole && activation == Activation::NONE) *budget = 0;
  }

  void require_good(int64_t r, int64_t o, float actual) const {
    double exact, budget;
    expect(r, o, &exact, &budget);
    const bool good = std::isnan(exact)   ? std::isnan(actual)
                      : std::isinf(exact) ? actual == exact
                                          : std::abs(actual - exact) <= budget;
    require(good, "row " + std::to_string(r) + ", column " + std::to_string(o) + " of rows " +
                      std::to_string(rows) + ", depth " + std::to_string(begin) + " to " +
                      std::to_string(end) + " of " + std::to_string(linear.in) + ", out " +
                      std::to_string(linear.out) + ", activation " +
                      std::to_string(int(activation)) + " is " + std::to_string(actual) +
                      ", expected " + std::to_string(exact) + " within " + std::to_string(budget));
  }
};

void run_case(const PackedLinearKernels& kernels, uint64_t seed) {
  Case c(seed);
  const Panels panels = pack({&c.linear}, vitslim::DType::BFLOAT16, c.random.between(0, 1));
  const int64_t count = (c.linear.out + PANEL - 1) / PANEL;
  Product p{};
  p.x = c.x.data();
  p.rows = c.rows;
  p.x_stride = c.x_stride;
  p.weight = {panels.data(), panels.dtype, true, c.linear.in, c.linear.out};
  p.panel_begin = c.random.chance(0.5) ? c.random.between(0, count) : 0;
  p.panel_end = c.random.chance(0.5) ? c.random.between(p.panel_begin, count) : count;
  p.depth_begin = c.begin;
  p.depth_end = c.end;
  p.activation = c.activation;
  const Exact<float> bias = exactly(c.linear.bias, 1), scale = exactly(c.scale, 1);
  const Exact<float> residual = exactly(c.residual, 1);
  Exact<float> y = c.in_place ? residual : Exact<float>(c.rows * c.y_stride, 1, UNTOUCHED);
  const Exact<float> before = y;
  if (bias.size()) p.bias = bias.data();
  if (scale.size()) p.scale = scale.data();
  if (residual.size()) p.residual = c.in_place ? y.data() : residual.data();
  p.residual_stride = p.y_stride = c.y_stride;
  p.y = y.data();
  Exact<float> scratch(kernels.scratch(c.rows, c.linear.in, panels.dtype, true), 0, NAN);
  kernels.multiply(p, scratch.data());
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t o = 0; o < c.y_stride; ++o) {
      const float actual = y[r * c.y_stride + o];
      if (o < c.linear.out && p.panel_begin <= o / PANEL && o / PANEL < p.panel_end)
        c.require_good(r, o, actual);
      else
        require(actual == before[r * c.y_stride + o], "wrote beside its columns");
    }
  }
}

// All but products of bfloat16 pairs is AVX512's work.
void require_handing_on(const PackedLinearKernels& kernels) {
  using vitslim::handed_on;
  require(handed_on == 0, "a product of bfloat16 pairs called AVX512's kernels");
  Product p{};
  p.weight.dtype = vitslim::DType::BFLOAT16;
  kernels.multiply(p, nullptr);
  kernels.scratch(1, 1, p.weight.dtype, false);
  kernels.normalise(nullptr, 0, 0, 0, {}, nullptr, nullptr, 0);
  kernels.multiply_adds(1);
  require(handed_on == 4, "something else was not handed on to AVX512's kernels");
}

// The kernels of that name, or null where this machine or its compiler has them not.
const PackedLinearKernels* kernels_called(const std::string& name) {
  if (name == "amx-portable") return &vitslim::BESIDE_AVX512;
#if defined(VITSLIM_HAS_AMX_BF16)
  if (name == "amx-bf16" && isa_available(Isa::AMX_BF16)) return &vitslim::packed_linear_amx_bf16;
  if (name == "amx-emulated" && isa_available(Isa::AVX512_BF16))
    return &vitslim::packed_linear_amx_emulated;
#endif
#if defined(VITSLIM_HAS_AVX512_BF16)
  if (name == "avx512-bf16" && isa_available(Isa::AVX512_BF16))
    return &vitslim::packed_linear_avx512_bf16;
#endif
  return nullptr;
}

int run(const std::string& name, int64_t count, uint64_t seed) {
  const PackedLinearKernels* kernels = kernels_called(name);
  if (!kernels) {
    std::cout << "this processor, or the compiler, has not what " << name << " needs\n";
    return 77;
  }
  for (int64_t i = 0; i < count; ++i) {
    try {
      run_case(*kernels, seed + uint64_t(i));
    } catch (const std::exception& error) {
      std::cerr << error.what() << "\n  the same again: bfloat16_products " << name << " 1 "
                << seed + uint64_t(i) << "\n";
      return 1;
    }
  }
  require_handing_on(*kernels);
  std::cout << name << ": " << count << " cases\n";
  return 0;
}

}  // namespace
}  // namespace stress

int main(int count, char** arguments) {
  if (count != 4) {
    std::cerr << "usage: bfloat16_products KERNEL COUNT SEED\n";
    return 1;
  }
  return stress::run(arguments[1], std::atoll(arguments[2]), uint64_t(std::atoll(arguments[3])));
}
