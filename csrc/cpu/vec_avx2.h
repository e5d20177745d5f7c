// One vector of 8 floats in an AVX register, with FMA and F16C. Included by vec.h only, which says
// what each function promises.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace vitslim {
namespace {

constexpr int LANES = 8;
constexpr int REGISTERS = 16;
using Vec = __m256;

INLINE Vec zero() { return _mm256_setzero_ps(); }
INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }

INLINE float sum_lanes(Vec x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// 2^n for whole n, -126 <= n <= 127, built in the exponent bits.
INLINE Vec power_of_two(__m256i n) {
  const __m256i biased = _mm256_add_epi32(n, _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

// max and min return their second operand when one is NaN, so a NaN stays; beyond these limits
// 2^x is 0 or infinity anyway.
INLINE Vec limit_exponent(Vec x) {
  return _mm256_min_ps(broadcast(250.0f), _mm256_max_ps(broadcast(-250.0f), x));
}
INLINE Vec fraction(Vec x) {
  x = limit_exponent(x);
  return sub(x, _mm256_floor_ps(x));
}
INLINE Vec scale_by_exp2_floor(Vec y, Vec x) {
  const __m256i n = _mm256_cvtps_epi32(_mm256_floor_ps(limit_exponent(x)));
  // Two factors, so that results below 2^-126 underflow gradually instead of wrapping around.
  const __m256i half = _mm256_srai_epi32(n, 1);
  return mul(mul(y, power_of_two(half)), power_of_two(_mm256_sub_epi32(n, half)));
}

INLINE __m256i first_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count < LANES ? int(count) : LANES), lane);
}

INLINE Vec load_first(const float* p, int64_t count) {
  return count >= LANES ? load(p) : _mm256_maskload_ps(p, first_lanes(count));
}
INLINE void store_first(float* p, Vec x, int64_t count) {
  if (count >= LANES) {
    store(p, x);
  } else {
    _mm256_maskstore_ps(p, first_lanes(count), x);
  }
}

// Eight 16-bit numbers; AVX2 has no masked load of them, so a short row is read one by one.
INLINE __m128i load_first_16(const uint16_t* p, int64_t count) {
  if (count >= LANES) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  alignas(16) uint16_t row[LANES] = {};
  for (int64_t i = 0; i < count; ++i) row[i] = p[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(row));
}
INLINE void store_first_16(uint16_t* p, __m128i x, int64_t count) {
  if (count >= LANES) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x);
    return;
  }
  alignas(16) uint16_t row[LANES];
  _mm_store_si128(reinterpret_cast<__m128i*>(row), x);
  for (int64_t i = 0; i < count; ++i) p[i] = row[i];
}

INLINE Vec load_first(const BFloat16* p, int64_t count) {
  const __m256i bits = _mm256_cvtepu16_epi32(load_first_16(&p->bits, count));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
// The bits of x rounded to bfloat16 stand in the high halves of the lanes, and the low ones are 0.
INLINE __m256i bfloat16_bits(Vec x) {
  // Round to nearest even by adding half a unit, less one where the kept part is even. A NaN must
  // not round up into an infinity, so it becomes the quiet NaN.
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
  return _mm256_and_si256(rounded, _mm256_set1_epi32(int(0xffff0000)));
}
INLINE Vec round_to_bfloat16(Vec x) { return _mm256_castsi256_ps(bfloat16_bits(x)); }
INLINE void store_first(BFloat16* p, Vec x, int64_t count) {
  const __m256i halves = _mm256_srli_epi32(bfloat16_bits(x), 16);
  const __m128i kept =
      _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  store_first_16(&p->bits, kept, count);
}

// Eight pairs: the low halves of 32-bit lanes, and the high ones.
INLINE void load_pairs(const BFloat16* p, Vec* even, Vec* odd) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}

INLINE Vec load_first(const Float16* p, int64_t count) {
  return _mm256_cvtph_ps(load_first_16(&p->bits, count));
}
INLINE void store_first(Float16* p, Vec x, int64_t count) {
  store_first_16(&p->bits, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT), count);
}

INLINE void transpose(Vec (&rows)[LANES]) {
  Vec half[LANES];
  // Each half of the register, four lanes, is transposed within rows 0..3 and within rows 4..7.
#pragma GCC unroll 2
  for (int g = 0; g < 8; g += 4) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(rows[g], rows[g + 1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(rows[g], rows[g + 1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(rows[g + 2], rows[g + 3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(rows[g + 2], rows[g + 3]));
    half[g] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    half[g + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    half[g + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    half[g + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
  // Then the halves change places.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm256_permute2f128_ps(half[c], half[4 + c], 0x20);
    rows[4 + c] = _mm256_permute2f128_ps(half[c], half[4 + c], 0x31);
  }
}

}  // namespace
}  // namespace vitslim
