// One vector of 4 floats in the vector extension of GCC and Clang: SSE2 on any x86-64, NEON on ARM,
// plain scalars elsewhere. Included by vec.h only, which says what each function promises.

#pragma once

#include <cstdint>
#include <cstring>

namespace vitslim {
namespace {

constexpr int LANES = 4;
constexpr int REGISTERS = 16;
using Vec = float __attribute__((vector_size(16)));
using IntVec = int32_t __attribute__((vector_size(16)));

INLINE Vec zero() { return Vec{}; }
INLINE Vec broadcast(float x) { return Vec{x, x, x, x}; }
INLINE Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof(x));
  return x;
}
INLINE void store(float* p, Vec x) { memcpy(p, &x, sizeof(x)); }
INLINE Vec add(Vec a, Vec b) { return a + b; }
INLINE Vec sub(Vec a, Vec b) { return a - b; }
INLINE Vec mul(Vec a, Vec b) { return a * b; }
INLINE Vec div(Vec a, Vec b) { return a / b; }
#if defined(__FP_FAST_FMAF)
INLINE Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
#else
INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
INLINE float sum_lanes(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }

// A NaN fails both comparisons and stays; beyond these limits 2^x is 0 or infinity anyway.
INLINE Vec limit_exponent(Vec x) {
  x = x < broadcast(-250.0f) ? broadcast(-250.0f) : x;
  return x > broadcast(250.0f) ? broadcast(250.0f) : x;
}

// Adding 1.5 * 2^23 leaves the nearest whole number in the low bits, without a conversion that
// would be undefined for NaN. A step back where that rounded up makes it the floor.
INLINE Vec floor(Vec x, IntVec* n) {
  const Vec shifter = broadcast(12582912.0f);
  const Vec shifted = x + shifter;
  const Vec nearest = shifted - shifter;
  const IntVec above = nearest > x;  // -1 where true
  *n = ((IntVec)shifted - (IntVec)shifter) + above;
  return nearest - (above ? broadcast(1.0f) : zero());
}

INLINE Vec fraction(Vec x) {
  IntVec n;
  x = limit_exponent(x);
  return x - floor(x, &n);
}
INLINE Vec scale_by_exp2_floor(Vec y, Vec x) {
  IntVec n;
  floor(limit_exponent(x), &n);
  // Two factors, so that results below 2^-126 underflow gradually instead of wrapping around; the
  // mask keeps the bits that a NaN leaves in n from shifting into the sign.
  const IntVec half = n >> 1;
  const IntVec low = ((half + 127) & 255) << 23;
  const IntVec high = ((n - half + 127) & 255) << 23;
  return y * (Vec)low * (Vec)high;
}

INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}
INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
INLINE float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  // Infinity and NaN keep their fraction; all else is the same number with its exponent 112 too
  // small, which one exact product puts right, subnormal numbers included.
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude << 13));
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

INLINE void from_float(float x, float* y) { *y = x; }
INLINE void from_float(float x, BFloat16* y) {
  const uint32_t bits = bits_of(x);
  y->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE void from_float(float x, Float16* y) {
  const uint16_t sign = uint16_t((bits_of(x) >> 16) & 0x8000);
  const uint32_t magnitude = bits_of(x) & 0x7fffffff;
  if (x != x) {
    y->bits = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
    y->bits = sign | 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    y->bits = sign | uint16_t(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
  } else {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    y->bits = sign | uint16_t((rounded >> 13) - (112 << 10));
  }
}

template <typename T>
INLINE Vec load_first(const T* p, int64_t count) {
  Vec x = zero();
  for (int64_t i = 0; i < LANES && i < count; ++i) x[i] = to_float(p[i]);
  return x;
}
template <typename T>
INLINE void store_first(T* p, Vec x, int64_t count) {
  for (int64_t i = 0; i < LANES && i < count; ++i) from_float(x[i], p + i);
}

INLINE void load_pairs(const BFloat16* p, Vec* even, Vec* odd) {
  for (int i = 0; i < LANES; ++i) {
    (*even)[i] = to_float(p[2 * i]);
    (*odd)[i] = to_float(p[2 * i + 1]);
  }
}
INLINE Vec round_to_bfloat16(Vec x) {
  BFloat16 rounded[LANES];
  store_first(rounded, x, LANES);
  return load_first(rounded, LANES);
}

INLINE void transpose(Vec (&rows)[LANES]) {
  const Vec a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  rows[0] = Vec{a[0], b[0], c[0], d[0]};
  rows[1] = Vec{a[1], b[1], c[1], d[1]};
  rows[2] = Vec{a[2], b[2], c[2], d[2]};
  rows[3] = Vec{a[3], b[3], c[3], d[3]};
}

}  // namespace
}  // namespace vitslim
