// Multiply-adds on registers alone, as many chains as a tile has.

#pragma once

#include "tile.h"

namespace vitslim {
namespace {

// Makes x a number that the compiler knows nothing of.
INLINE void opaque(Vec* x) {
#if defined(__aarch64__)
  __asm__ volatile("" : "+w"(*x));
#elif defined(__x86_64__)
  __asm__ volatile("" : "+v"(*x));
#else
  __asm__ volatile("" : "+m"(*x));
#endif
}

// Does `steps` rounds and returns how many numbers were multiplied and added.
inline int64_t multiply_adds(int64_t steps) {
  constexpr int V = 2, R = MAX_ROWS<V>;
  Vec sums[R][V];
  clear_tile(sums);
  // The compiler must not know that the chains are alike, nor that nothing changes.
  for (auto& row : sums)
    for (Vec& sum : row) opaque(&sum);
  Vec left = broadcast(0.5f), right = broadcast(1.0f);
  for (int64_t i = 0; i < steps; ++i) {
    opaque(&left);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = fma(left, right, sums[r][v]);
  }
  Vec total = zero();
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) total = add(total, sums[r][v]);
  opaque(&total);
  return steps * R * V * LANES;
}

}  // namespace
}  // namespace vitslim
