// The activations of masked_mlp and their derivatives, in float32.
//
// Value and derivative share what costs: gelu's density is the exponential inside its error
// function, the others' gate is one sigmoid. Whoever uses the value alone pays nothing for the
// derivative.

#pragma once

#include "../activation.h"
#include "ptx.cuh"

namespace vitslim {

struct Activated {
  float value, slope;
};

// 1 / (1 + exp(-x)); where the exponential overflows, the right zero.
__device__ inline float sigmoid(float x) {
  return reciprocal_fast(1.0f + exp2_fast(-1.4426950408889634f * x));
}

// u sigmoid(slope u): silu and quick_gelu.
__device__ inline Activated gated(float u, float slope) {
  const float gate = sigmoid(slope * u), value = u * gate;
  return {value, gate + slope * value * (1.0f - gate)};
}

// (1 + tanh(y)) / 2 is sigmoid(2 y), y = sqrt(2 / pi) (u + 0.044715 u^3).
__device__ inline Activated gelu_tanh(float u) {
  const float square = u * u;
  const float gate = sigmoid(u * (1.5957691216057308f + 0.07135481627159f * square));
  const float value = u * gate, slope = 1.5957691216057308f + 0.21406444881478f * square;
  return {value, gate + value * (1.0f - gate) * slope};
}

// u P(u), P the normal distribution; the derivative is P(u) + u p(u), p its density. The tail is
// P(-|u|) = exp(-u^2 / 2) (a1 t + ... + a5 t^5) / 2 with t = 1 / (1 + 0.3275911 |u| / sqrt(2)),
// Abramowitz and Stegun 7.1.26, within 1e-7: what float32 rounds anyway, and half the instructions
// of an error function and an exponential.
__device__ inline Activated gelu(float u) {
  const float bell = exp2_fast(-0.7213475204444817f * u * u);
  const float t = reciprocal_fast(1.0f + 0.23164190f * fabsf(u));
  // The coefficients are halved.
  float tail = 0.5307027145f * t - 0.7265760135f;
  tail = tail * t + 0.7107068705f;
  tail = tail * t - 0.142248368f;
  tail = (tail * t + 0.127414796f) * t * bell;
  const float normal = u < 0.0f ? tail : 1.0f - tail;
  return {u * normal, normal + 0.3989422804014327f * u * bell};
}

// NaN stays NaN.
template <Activation ACTIVATION>
__device__ inline Activated activate(float u) {
  if constexpr (ACTIVATION == Activation::GELU) return gelu(u);
  if constexpr (ACTIVATION == Activation::GELU_TANH) return gelu_tanh(u);
  if constexpr (ACTIVATION == Activation::QUICK_GELU) return gated(u, 1.702f);
  if constexpr (ACTIVATION == Activation::SILU) return gated(u, 1.0f);
  // Written so that NaN, which is neither below zero nor above, goes through as in PyTorch.
  if constexpr (ACTIVATION == Activation::RELU)
    return {u <= 0.0f ? 0.0f : u, u > 0.0f ? 1.0f : 0.0f};
}

}  // namespace vitslim
