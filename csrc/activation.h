// The activations between the two linear layers of an MLP.

#pragma once

#include <cstdint>

namespace vitslim {

// The numbers are those that `layout` holds (vit_encoder.h).
enum class Activation { NONE, GELU, GELU_TANH, QUICK_GELU, SILU, RELU };
constexpr int64_t ACTIVATION_COUNT = 6;

}  // namespace vitslim
