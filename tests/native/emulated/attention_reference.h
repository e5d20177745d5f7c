// Random calls of ragged_attention, and what it answers, written from the formulas of
// csrc/ragged_attention.h alone.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../../../csrc/ragged_attention.h"
#include "compare.h"

namespace emulated {

struct AttentionSetup {
  int64_t batch = 1, tokens = 1;
  std::vector<int64_t> widths;
  bool masked = false;
  float scale = 0.25f;
  double spread = 1;       // of q, k and v
  int64_t shift = 0;       // elements from the allocator's boundary to the first of every tensor
  int64_t token_gap = 0;   // elements between the tokens of qkv and of grad_out
  int64_t batch_gap = 0;   // elements between their images
  bool one_image = false;  // batch stride 0 of qkv and grad_out: all images are the same
  uint64_t seed = 1;
};

// The tensors of a call, as large as their strides need and no larger.
template <typename E>
struct AttentionInputs {
  explicit AttentionInputs(const AttentionSetup& from) : setup(from), offsets{0} {
    for (const int64_t width : setup.widths) offsets.push_back(offsets.back() + width);
    qkv_token_stride = 3 * columns() + setup.token_gap;
    grad_out_token_stride = columns() + setup.token_gap;
    if (!setup.one_image) {
      qkv_batch_stride = setup.tokens * qkv_token_stride + setup.batch_gap;
      grad_out_batch_stride = setup.tokens * grad_out_token_stride + setup.batch_gap;
    }
    stress::Random random(setup.seed);
    const auto size = [&](int64_t batch_stride, int64_t token_stride, int64_t width) {
      if (setup.batch == 0 || setup.tokens == 0) return int64_t(0);
      return (setup.batch - 1) * batch_stride + (setup.tokens - 1) * token_stride + width;
    };
    qkv = random_numbers<E>(size(qkv_batch_stride, qkv_token_stride, 3 * columns()), random,
                            setup.spread, setup.shift);
    grad_out = random_numbers<E>(size(grad_out_batch_stride, grad_out_token_stride, columns()),
                                 random, 1, setup.shift);
    mask = random_numbers<float>(columns(), random, 1, setup.shift);
    // A third of the dimensions are cut away, as training with a mask does.
    for (float& each : mask)
      if (random.chance(0.3)) each = 0;
  }

  int64_t heads() const { return int64_t(setup.widths.size()); }
  int64_t columns() const { return offsets.back(); }
  const float* mask_or_null() const { return setup.masked ? mask.data() : nullptr; }

  vitslim::RaggedAttentionShape shape() const {
    return {.batch = setup.batch,
            .tokens = setup.tokens,
            .heads = heads(),
            .head_offsets = offsets.data(),
            .scale = setup.scale,
            .dtype = DTYPE<E>,
            .qkv_batch_stride = qkv_batch_stride,
            .qkv_token_stride = qkv_token_stride};
  }

  AttentionSetup setup;
  std::vector<int64_t> offsets;  // [heads + 1]
  int64_t qkv_batch_stride = 0, qkv_token_stride = 0;
  int64_t grad_out_batch_stride = 0, grad_out_token_stride = 0;
  stress::Exact<E> qkv;       // [batch, tokens, 3 * D] by its strides
  stress::Exact<E> grad_out;  // [batch, tokens, D] by its strides
  stress::Exact<float> mask;  // [D]
};

struct AttentionAnswer {
  std::vector<double> out;        // [batch, tokens, D]
  std::vector<double> lse;        // [batch, heads, tokens]
  std::vector<double> grad_qkv;   // [batch, tokens, 3 * D]
  std::vector<double> grad_mask;  // [D], empty without a mask
};

// In arithmetic of type Number: double for the exact answer, float for what eager's float32 errs.
// Rows with infinite scores answer as torch's softmax and logsumexp do.
template <typename Number, typename E>
AttentionAnswer attention_answer(const AttentionInputs<E>& inputs) {
  const int64_t batch = inputs.setup.batch, tokens = inputs.setup.tokens;
  const int64_t heads = inputs.heads(), columns = inputs.columns();
  const Number scale = inputs.setup.scale;
  AttentionAnswer answer;
  answer.out.resize(batch * tokens * columns);
  answer.lse.resize(batch * heads * tokens);
  answer.grad_qkv.resize(batch * tokens * 3 * columns);
  std::vector<Number> grad_mask(inputs.setup.masked ? columns : 0);
  using Matrix = std::vector<Number>;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t offset = inputs.offsets[h], width = inputs.offsets[h + 1] - offset;
      const auto z = [&](int64_t c) {
        return inputs.setup.masked ? Number(inputs.mask[offset + c]) : Number(1);
      };
      // Part 0 is q, 1 is k, 2 is v.
      const auto plain = [&](int64_t part, int64_t i, int64_t c) {
        const int64_t at = b * inputs.qkv_batch_stride + i * inputs.qkv_token_stride;
        return Number(vitslim::to_float(inputs.qkv[at + part * columns + offset + c]));
      };
      const auto grad = [&](int64_t i, int64_t c) {
        const int64_t at = b * inputs.grad_out_batch_stride + i * inputs.grad_out_token_stride;
        return Number(vitslim::to_float(inputs.grad_out[at + offset + c]));
      };
      Matrix masked[3];
      for (int64_t part = 0; part < 3; ++part)
        for (int64_t i = 0; i < tokens; ++i)
          for (int64_t c = 0; c < width; ++c) masked[part].push_back(plain(part, i, c) * z(c));
      Matrix grads[3];
      for (Matrix& each : grads) each.assign(tokens * width, Number(0));
      Matrix p(tokens), grad_p(tokens);
      for (int64_t i = 0; i < tokens; ++i) {
        Number peak = -Number(INFINITY);
        for (int64_t j = 0; j < tokens; ++j) {
          Number sum = 0;
          for (int64_t c = 0; c < width; ++c)
            sum += masked[0][i * width + c] * masked[1][j * width + c];
          p[j] = scale * sum;
          peak = p[j] > peak || std::isnan(p[j]) ? p[j] : peak;
        }
        Number sum = 0, sum_of_logits = 0;
        const Number base = std::isinf(peak) ? Number(0) : peak;
        for (Number& each : p) {
          sum_of_logits += std::exp(each - base);
          each = std::exp(each - peak);
          sum += each;
        }
        for (Number& each : p) each /= sum;
        answer.lse[(b * heads + h) * tokens + i] = base + std::log(sum_of_logits);
        Number delta = 0;
        for (int64_t c = 0; c < width; ++c) {
          Number out = 0;
          for (int64_t j = 0; j < tokens; ++j) out += p[j] * masked[2][j * width + c];
          answer.out[(b * tokens + i) * columns + offset + c] = out;
          delta += grad(i, c) * out;
        }
        for (int64_t j = 0; j < tokens; ++j) {
          grad_p[j] = 0;
          for (int64_t c = 0; c < width; ++c) grad_p[j] += grad(i, c) * masked[2][j * width + c];
          const Number grad_score = scale * p[j] * (grad_p[j] - delta);
          for (int64_t c = 0; c < width; ++c) {
            grads[0][i * width + c] += grad_score * masked[1][j * width + c];
            grads[1][j * width + c] += grad_score * masked[0][i * width + c];
            grads[2][j * width + c] += p[j] * grad(i, c);
          }
        }
      }
      for (int64_t part = 0; part < 3; ++part)
        for (int64_t i = 0; i < tokens; ++i)
          for (int64_t c = 0; c < width; ++c) {
            const Number each = grads[part][i * width + c];
            answer.grad_qkv[(b * tokens + i) * 3 * columns + part * columns + offset + c] =
                each * z(c);
            if (inputs.setup.masked) grad_mask[offset + c] += each * plain(part, i, c);
          }
    }
  answer.grad_mask.assign(grad_mask.begin(), grad_mask.end());
  return answer;
}

// What a forward kernel would hand to a backward kernel: exact numbers, rounded once to E.
template <typename E>
stress::Exact<E> rounded(const std::vector<double>& numbers, int64_t shift = 0) {
  stress::Exact<E> result(int64_t(numbers.size()), shift);
  for (size_t i = 0; i < numbers.size(); ++i)
    result[int64_t(i)] = vitslim::from_float<E>(float(numbers[i]));
  return result;
}

// How far the answer of one arithmetic is from the exact one.
inline double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::abs(a[i] - b[i]));
  return largest;
}

}  // namespace emulated
