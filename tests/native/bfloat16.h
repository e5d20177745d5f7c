// bfloat16 by integer arithmetic, on its own so that it can disagree with the kernels.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace stress {

// Round to nearest, ties to even; a NaN stays one.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return uint16_t(bits >> 16 | 0x40);
  const uint32_t below = bits & 0xffff, kept = bits >> 16;
  return uint16_t(kept + (below > 0x8000 || (below == 0x8000 && kept % 2 == 1)));
}

inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }

inline float rounded_to_bfloat16(float value) { return from_bfloat16(to_bfloat16(value)); }

}  // namespace stress
