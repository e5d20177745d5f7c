// Random cases of the encoder's parts, each called alone.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../../csrc/ragged_attention.h"
#include "fuzz.h"

namespace stress {

// A matrix in memory whose rows lie `stride` apart; what lies between them must stay as it is.
struct Rows {
  int64_t rows, columns, stride;
  Exact<float> values;

  Rows(Random& random, int64_t rows, int64_t columns, double deviation)
      : rows(rows),
        columns(columns),
        stride(columns + (random.chance(0.5) ? random.between(0, 20) : 0)),
        values(rows == 0 ? 0 : (rows - 1) * stride + columns, random.between(0, 1), UNWRITTEN) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns; ++c) at(i, c) = float(deviation * random.normal());
  }
  float& at(int64_t i, int64_t c) { return values[i * stride + c]; }
  const float& at(int64_t i, int64_t c) const { return values[i * stride + c]; }
  Matrix matrix() const {
    Matrix matrix(rows, columns);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < columns; ++c) matrix.row(i)[c] = at(i, c);
    return matrix;
  }
};

inline double fuzz_linear(uint64_t seed, const std::vector<vitslim::Isa>& isas, Pools& pools,
                          std::string& what) {
  Random random(seed);
  const bool deep = random.chance(0.05), wide = random.chance(0.05);
  const int64_t rows = random.size(0, deep ? 20 : 70), in = random.size(0, deep ? 3000 : 150);
  const int64_t out = random.size(0, wide ? 800 : 150);
  const auto dtype = random.pick({vitslim::DType::FLOAT32, vitslim::DType::BFLOAT16});
  const bool halves = dtype == vitslim::DType::BFLOAT16 && random.chance(0.5);
  const Trouble trouble = random_trouble(random);
  const auto activation = vitslim::Activation(random.between(0, vitslim::ACTIVATION_COUNT - 1));
  const bool normed = random.chance(0.4), biased = random.chance(0.7);
  const bool added = random.chance(0.5), scaled = added && random.chance(0.5);
  const bool in_place = added && random.chance(0.5);
  Linear linear = random_linear(random, in, out, dtype, biased);
  const Norm norm = random_norm(random, in);
  const Floats scale = random_floats(random, out, 0, 1);
  Rows x(random, rows, in, deviation_of(trouble));
  const Rows residual(random, rows, out, 1);
  if (trouble == Trouble::NOT_FINITE && rows * in > 0)
    x.at(random.between(0, rows - 1), random.between(0, in - 1)) = random_not_finite(random);
  what = "linear: rows " + std::to_string(rows) + ", in " + std::to_string(in) + ", out " +
         std::to_string(out) + ", dtype " + std::to_string(int(dtype)) + ", bfloat16 products " +
         std::to_string(halves) + ", activation " + std::to_string(int(activation)) + ", norm " +
         std::to_string(normed) + ", bias " + std::to_string(biased) + ", residual " +
         std::to_string(added) + ", scale " + std::to_string(scaled) + ", in place " +
         std::to_string(in_place) + ", trouble " + std::to_string(int(trouble));

  // Without a norm the operands are known exactly, and so are their roundings.
  const Noise noise = halves && normed ? BFLOAT16_NOISE : FLOAT32_NOISE;
  const Noise known = {noise.stored, halves && !normed ? 0.0 : noise.rounded};
  const Expected expected = expect(halves, known, seed, [&](Reference& reference) {
    Matrix y =
        reference.product(normed ? reference.layer_norm(x.matrix(), norm) : x.matrix(), linear);
    reference.activate(y, int64_t(activation));
    if (added)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t o = 0; o < out; ++o)
          y.row(i)[o] = residual.at(i, o) + (scaled ? scale[o] : 1.0) * y.row(i)[o];
    return y;
  });

  const Panels panels = pack({&linear}, dtype, random.between(0, 1));
  const Exact<float> bias = exactly(linear.bias, 1), factors = exactly(scale, 1);
  const Exact<float> weight = exactly(norm.weight, 1), offset = exactly(norm.bias, 1);
  const vitslim::LayerNorm layer_norm = {weight.data(), offset.data(), norm.eps};
  const int64_t elements = residual.values.size(), stride = residual.stride;
  return run_every_way(
      isas, pools, elements,
      [&](float* y, const vitslim::Threads& threads) {
        if (in_place) std::copy(residual.values.begin(), residual.values.end(), y);
        const float* r = in_place ? y : residual.values.data();
        vitslim::packed_linear_cpu({x.values.data(),
                                    normed ? &layer_norm : nullptr,
                                    {panels.data(), dtype, halves, in, out},
                                    biased ? bias.data() : nullptr,
                                    activation,
                                    added ? r : nullptr,
                                    scaled ? factors.data() : nullptr,
                                    y,
                                    rows,
                                    x.stride,
                                    stride,
                                    stride},
                                   threads);
      },
      [&](const float* y) {
        std::vector<float> dense;
        for (int64_t i = 0; i < elements; ++i) {
          if (i % stride < out)
            dense.push_back(y[i]);
          else
            require(y[i] == UNWRITTEN, "wrote between two rows");
        }
        return error_of(dense.data(), expected);
      });
}

inline double fuzz_attention(uint64_t seed, const std::vector<vitslim::Isa>& isas, Pools& pools,
                             std::string& what) {
  Random random(seed);
  const int64_t batch = random.between(0, 3), tokens = random.size(0, 130);
  const Trouble trouble = random_trouble(random);
  std::vector<int64_t> widths, offsets = {0};
  what = "attention: batch " + std::to_string(batch) + ", tokens " + std::to_string(tokens) +
         ", trouble " + std::to_string(int(trouble)) + ", heads";
  for (int64_t left = random.between(1, 4); left > 0; --left) {
    widths.push_back(random.size(0, 70));
    offsets.push_back(offsets.back() + widths.back());
    what += " " + std::to_string(widths.back());
  }
  const int64_t all = offsets.back();
  // Products of 1e15 and 1e15 are beyond what a softmax can tell apart.
  const double deviation = trouble == Trouble::HUGE_NUMBERS ? 1 : deviation_of(trouble);
  Rows qkv(random, batch * tokens, 3 * all, std::min(deviation, 30.0));
  if (trouble == Trouble::NOT_FINITE && qkv.rows * all > 0)
    qkv.at(random.between(0, qkv.rows - 1), random.between(0, 3 * all - 1)) = NAN;
  const float scale = float(random.symmetric());
  const bool masked = random.chance(0.5);
  const Floats mask = random_floats(random, all, 0.5, 0.5);

  const Exact<float> factors = exactly(mask, 1);
  std::vector<Expected> expected;
  for (int64_t image = 0; image < batch; ++image)
    expected.push_back(expect(false, FLOAT32_NOISE, seed, [&](Reference& reference) {
      Matrix one(tokens, 3 * all);
      for (int64_t i = 0; i < tokens; ++i)
        for (int64_t c = 0; c < 3 * all; ++c)
          one.row(i)[c] = qkv.at(image * tokens + i, c) * (masked ? double(mask[c % all]) : 1.0);
      return reference.attention(one, widths, scale);
    }));
  return run_every_way(
      isas, pools, batch * tokens * all,
      [&](float* out, const vitslim::Threads& threads) {
        vitslim::ragged_attention_forward_cpu(
            {{batch, tokens, int64_t(widths.size()), offsets.data(), scale, vitslim::DType::FLOAT32,
              tokens * qkv.stride, qkv.stride},
             qkv.values.data(),
             masked ? factors.data() : nullptr,
             out,
             nullptr},
            threads);
      },
      [&](const float* out) {
        double part = 0;
        for (int64_t image = 0; image < batch; ++image)
          part = std::max(part, error_of(out + image * tokens * all, expected[image]));
        return part;
      });
}

}  // namespace stress
