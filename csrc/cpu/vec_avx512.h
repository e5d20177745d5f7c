// One vector of 16 floats in an AVX-512 register. Included by vec.h only, which says what each
// function promises.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace vitslim {
namespace {

constexpr int LANES = 16;
constexpr int REGISTERS = 32;
using Vec = __m512;

INLINE Vec zero() { return _mm512_setzero_ps(); }
INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
INLINE float sum_lanes(Vec x) { return _mm512_reduce_add_ps(x); }

INLINE Vec fraction(Vec x) {
  return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
INLINE Vec scale_by_exp2_floor(Vec y, Vec x) { return _mm512_scalef_ps(y, x); }

// table[floor(x)] for 0 <= x < 32.
INLINE Vec look_up(const float (&table)[32], Vec x) {
  return _mm512_permutex2var_ps(load(table), _mm512_cvttps_epi32(x), load(table + 16));
}
INLINE Vec absolute(Vec x) { return _mm512_abs_ps(x); }

INLINE __mmask16 first_lanes(int64_t count) {
  return count >= LANES ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
}

INLINE Vec load_first(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), p);
}
INLINE void store_first(float* p, Vec x, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), x);
}

INLINE Vec load_first(const BFloat16* p, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
// The bits of x rounded to bfloat16 stand in the high halves of the lanes, and the low ones are 0.
INLINE __m512i bfloat16_bits(Vec x) {
  // Round to nearest even by adding half a unit, less one where the kept part is even. A NaN must
  // not round up into an infinity, so it becomes the quiet NaN.
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_and_si512(rounded, _mm512_set1_epi32(int(0xffff0000)));
}
INLINE Vec round_to_bfloat16(Vec x) { return _mm512_castsi512_ps(bfloat16_bits(x)); }
#if defined(VITSLIM_TARGET_AVX512_BF16) || defined(VITSLIM_TARGET_AMX_BF16)
// Makes subnormal numbers zero, for which products of bfloat16 pairs take them anyway.
INLINE __m256i to_bfloat16(Vec x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else
INLINE __m256i to_bfloat16(Vec x) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bfloat16_bits(x), 16));
}
#endif
INLINE void store_first(BFloat16* p, Vec x, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), to_bfloat16(x));
}

// Sixteen pairs: the low halves of 32-bit lanes, and the high ones.
INLINE void load_pairs(const BFloat16* p, Vec* even, Vec* odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
}

INLINE Vec load_first(const Float16* p, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
INLINE void store_first(Float16* p, Vec x, int64_t count) {
  const __m256i kept = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(p, first_lanes(count), kept);
}

// Interleaves pairs of rows, then pairs of pairs: afterwards row 4*g + c holds, in each 128-bit
// quarter, the 4x4 block transposed of rows 4*g..4*g+3.
INLINE void transpose_quarters(Vec (&rows)[LANES]) {
#pragma GCC unroll 4
  for (int g = 0; g < 4; ++g) {
    Vec* r = rows + 4 * g;
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[0], r[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(r[0], r[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[2], r[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(r[2], r[3]));
    r[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
}

INLINE void transpose(Vec (&rows)[LANES]) {
  transpose_quarters(rows);
  // The 128-bit quarters form a 4x4 matrix for each column c; 0x88 picks the even quarters of two
  // registers and 0xdd the odd ones, so two rounds transpose it.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Vec even01 = _mm512_shuffle_f32x4(rows[c], rows[4 + c], 0x88);
    const Vec odd01 = _mm512_shuffle_f32x4(rows[c], rows[4 + c], 0xdd);
    const Vec even23 = _mm512_shuffle_f32x4(rows[8 + c], rows[12 + c], 0x88);
    const Vec odd23 = _mm512_shuffle_f32x4(rows[8 + c], rows[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    rows[4 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    rows[8 + c] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    rows[12 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}

}  // namespace
}  // namespace vitslim
