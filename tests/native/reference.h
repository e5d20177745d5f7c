// The encoder and its parts in double, plainly, from the words of vit_encoder.h.
//
// Float32 arithmetic cannot be exact, and how much of its error arrives at the output depends on
// the model: a layer norm of two nearly equal channels makes it large. So the reference can also
// run with every operand of a product and every stored result disturbed by some rounding errors of
// float32, and the kernels may err by what that changes (expected.h).

#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "bfloat16.h"
#include "model.h"
#include "random.h"

namespace stress {

struct Matrix {
  int64_t rows, columns;
  std::vector<double> values;
  Matrix(int64_t rows, int64_t columns)
      : rows(rows), columns(columns), values(rows * columns, 0.0) {}
  double* row(int64_t i) { return values.data() + i * columns; }
  const double* row(int64_t i) const { return values.data() + i * columns; }
};

// The relative size of what disturbs every number, and of what disturbs the operands that become
// bfloat16 before they do: there the smallest difference can change the side they round to.
struct Noise {
  double stored = 0, rounded = 0;
};

// Plain, but not slowed down by a sanitizer: most of the time goes here.
template <typename T>
__attribute__((no_sanitize("address", "undefined", "thread"))) double dot(const double* a,
                                                                          const T* b, int64_t count,
                                                                          double sum) {
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

class Reference {
 public:
  Reference(bool bfloat16_products, Noise noise, uint64_t seed)
      : bfloat16_products_(bfloat16_products), noise_(noise), random_(seed) {}

  Matrix encode(const Model& model, const float* image) {
    Matrix x = embed(model, image);
    if (model.has_pre_norm) x = layer_norm(x, model.pre_norm);
    for (const Block& block : model.blocks) x = run_block(x, block);
    if (model.has_final_norm) x = layer_norm(x, model.final_norm);
    Matrix out(model.rows, x.columns);
    for (int64_t i = 0; i < out.rows; ++i)
      for (int64_t c = 0; c < x.columns; ++c) out.row(i)[c] = x.row(i)[c];
    return out;
  }

  // x W^T + b; without a bias where the linear has none.
  Matrix product(const Matrix& x, const Linear& linear) {
    Matrix left = x;
    for (double& value : left.values) value = operand(value);
    Matrix y(x.rows, linear.out);
    for (int64_t i = 0; i < x.rows; ++i)
      for (int64_t o = 0; o < linear.out; ++o)
        y.row(i)[o] = stored(dot(left.row(i), linear.weight.data() + o * linear.in, linear.in,
                                 linear.bias.empty() ? 0.0 : linear.bias[o]));
    return y;
  }

  Matrix layer_norm(const Matrix& x, const Norm& norm) {
    Matrix y(x.rows, x.columns);
    for (int64_t i = 0; i < x.rows; ++i) {
      double mean = 0, variance = 0;
      for (int64_t c = 0; c < x.columns; ++c) mean += x.row(i)[c] / double(x.columns);
      mean = stored(mean);
      for (int64_t c = 0; c < x.columns; ++c)
        variance += (x.row(i)[c] - mean) * (x.row(i)[c] - mean) / double(x.columns);
      for (int64_t c = 0; c < x.columns; ++c) {
        const double normed = stored(x.row(i)[c] - mean) / std::sqrt(variance + norm.eps);
        y.row(i)[c] = stored(stored(normed * norm.weight[c]) + norm.bias[c]);
      }
    }
    return y;
  }

  void activate(Matrix& x, int64_t activation) {
    for (double& value : x.values) {
      // Where the answer is nearly 0 because two numbers cancel, the error is that of the numbers.
      const double error = activation == 0 ? 0.0 : disturbed(value, noise_.stored) - value;
      value = stored(activated(value, activation));
      if (std::isfinite(error)) value += error;
    }
  }

  // qkv: [tokens, 3 D], all heads of q, then of k, then of v. Returns [tokens, D].
  Matrix attention(Matrix qkv, const std::vector<int64_t>& heads, double scale) {
    for (double& value : qkv.values) value = stored(value);
    const int64_t all = qkv.columns / 3, tokens = qkv.rows;
    Matrix values(all, tokens), out(tokens, all);
    for (int64_t i = 0; i < tokens; ++i)
      for (int64_t c = 0; c < all; ++c) values.row(c)[i] = qkv.row(i)[2 * all + c];
    int64_t first = 0;
    for (const int64_t width : heads) {
      for (int64_t i = 0; i < tokens; ++i) {
        const double* query = qkv.row(i) + first;
        std::vector<double> weights(tokens);
        double largest = -INFINITY, total = 0;
        for (int64_t j = 0; j < tokens; ++j) {
          weights[j] = stored(scale * dot(query, qkv.row(j) + all + first, width, 0.0));
          if (weights[j] > largest || std::isnan(weights[j])) largest = weights[j];
        }
        for (double& weight : weights) total += weight = stored(std::exp(weight - largest));
        for (double& weight : weights) weight /= total;
        for (int64_t c = first; c < first + width; ++c)
          out.row(i)[c] = stored(dot(weights.data(), values.row(c), tokens, 0.0));
      }
      first += width;
    }
    return out;
  }

  // The forms are PyTorch's, for the sake of what they make of infinities.
  static double activated(double x, int64_t activation) {
    switch (vitslim::Activation(activation)) {
      case vitslim::Activation::NONE:
        return x;
      case vitslim::Activation::GELU:
        return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
      case vitslim::Activation::GELU_TANH:
        return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
      case vitslim::Activation::QUICK_GELU:
        return x * (1 / (1 + std::exp(-1.702 * x)));
      case vitslim::Activation::SILU:
        return x / (1 + std::exp(-x));
      case vitslim::Activation::RELU:
        return x < 0 ? 0 : x;
    }
    return NAN;
  }

 private:
  double disturbed(double value, double noise) {
    return noise > 0 ? value * (1 + noise * random_.symmetric()) : value;
  }

  // What becomes of a number that float32 arithmetic keeps.
  double stored(double value) { return disturbed(value, noise_.stored); }

  // What becomes of a number that goes into a product from the left.
  double operand(double value) {
    if (!bfloat16_products_) return stored(value);
    return stored(rounded_to_bfloat16(float(disturbed(value, noise_.rounded))));
  }

  Matrix embed(const Model& model, const float* image) {
    Matrix pixels(model.grid_height * model.grid_width, model.patches.in);
    for (int64_t i = 0; i < pixels.rows; ++i) {
      const int64_t top = i / model.grid_width * model.patch_height;
      const int64_t left = i % model.grid_width * model.patch_width;
      double* pixel = pixels.row(i);
      for (int64_t channel = 0; channel < model.in_chans; ++channel)
        for (int64_t y = top; y < top + model.patch_height; ++y)
          for (int64_t x = left; x < left + model.patch_width; ++x)
            *pixel++ = image[(channel * model.height() + y) * model.width() + x];
    }
    const Matrix patches = product(pixels, model.patches);
    Matrix x(model.tokens(), model.embed_dim);
    for (int64_t i = 0; i < x.rows; ++i)
      for (int64_t c = 0; c < x.columns; ++c) {
        x.row(i)[c] = model.start[i * x.columns + c];
        if (i >= model.prefix) x.row(i)[c] = stored(x.row(i)[c] + patches.row(i - model.prefix)[c]);
      }
    return x;
  }

  Matrix gated_norm(const Matrix& x, const Norm& norm, const Floats& gate) {
    Matrix y = layer_norm(x, norm);
    if (gate.empty()) return y;
    for (int64_t i = 0; i < y.rows; ++i)
      for (int64_t c = 0; c < y.columns; ++c) y.row(i)[c] = stored(y.row(i)[c] * gate[i]);
    return y;
  }

  void add(Matrix& x, const Matrix& y, const Floats& scale) {
    for (int64_t i = 0; i < x.rows; ++i)
      for (int64_t c = 0; c < x.columns; ++c)
        x.row(i)[c] = stored(x.row(i)[c] + scale[c] * y.row(i)[c]);
  }

  Matrix run_block(const Matrix& arriving, const Block& block) {
    Matrix x(block.tokens, arriving.columns);
    for (int64_t i = 0; i < x.rows; ++i) {
      const double* source = arriving.row(block.selects ? block.kept[i] : i);
      for (int64_t c = 0; c < x.columns; ++c) x.row(i)[c] = source[c];
    }
    const Matrix qkv = product(gated_norm(x, block.norm1, block.gate), block.qkv);
    add(x, product(attention(qkv, block.heads, block.softmax_scale), block.proj), block.ls1);
    Matrix hidden = product(gated_norm(x, block.norm2, block.gate), block.fc1);
    activate(hidden, block.activation);
    add(x, product(hidden, block.fc2), block.ls2);
    return x;
  }

  bool bfloat16_products_;
  Noise noise_;
  Random random_;
};

}  // namespace stress
