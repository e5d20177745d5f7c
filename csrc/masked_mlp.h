// What a masked MLP does between its products; the products are left to the caller.
//
//   u = x W1^T + b1        h = z act(u)        out = h W2^T + b2
//
// Plain C++: no torch here.

#pragma once

#include <cstdint>

#include "activation.h"
#include "dtype.h"
#include "gpu.h"

namespace vitslim {

struct MaskedActivation {
  int64_t rows, units;
  DType dtype;  // of u, h and their gradients
  Activation activation;
  const float* mask;  // [units], or null for ones
};

// b1 is added where it is free, in the epilogue of the product: adding it here would write u once
// more.
struct MaskedActivationForward {
  MaskedActivation what;
  const void* pre_act;  // [rows, units], u
  void* hidden;         // [rows, units], h
};

// With E = G W2 the gradient of h:
//   grad_u = E z act'(u)      grad_z = sum of E act(u)      grad_b1 = sum of grad_u
struct MaskedActivationBackward {
  MaskedActivation what;
  const void* grad_hidden;  // [rows, units], E
  const void* pre_act;      // [rows, units], u
  void* grad_pre_act;       // [rows, units]; may be grad_hidden
  void* hidden;             // [rows, units], h once more
  // [sum_rows, 2 * units]: parts of grad_b1 and, behind them, of grad_z, for the caller to add up
  // in order.
  float* sums;
};

void masked_activation_forward_cuda(const MaskedActivationForward& call, const Gpu& gpu);
void masked_activation_backward_cuda(const MaskedActivationBackward& call, const Gpu& gpu);
// How many rows the latter writes of sums.
int64_t masked_activation_sum_rows_cuda(const MaskedActivation& what, const Gpu& gpu);

}  // namespace vitslim
