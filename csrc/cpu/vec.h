// Vectors of float32 for the CPU kernels.
//
// A kernel is written once, against the functions below, and compiled three times: the files
// <op>_avx512.cpp, <op>_avx2.cpp and <op>_portable.cpp each name a target (targets.h), include this
// header and then the kernel. Everything stands in an anonymous namespace, because the linker
// keeps one copy of an inline function with external linkage, and it could keep the AVX-512 one
// for a machine without it. For the same reason these units use no function templates of std.
//
// Every target provides
//   LANES, REGISTERS, Vec                    how wide, how many, and the register's type
//   zero broadcast load store                no alignment needed
//   add sub mul div max min                  max(a, b) and min(a, b) are b when either is NaN
//   fma(a, b, c)                             a * b + c
//   fraction(x)                              x - floor(x); NaN for NaN
//   scale_by_exp2_floor(y, x)                y * 2^floor(x); gradual underflow, 0 for x = -inf
//   sum_lanes(x)                             in a fixed order
//   load_first(p, n), store_first(p, x, n)   the first min(n, LANES) numbers of type float,
//                                            BFloat16 or Float16; missing ones read as 0,
//                                            stores round to nearest even
//   load_pairs(p, &even, &odd)               LANES pairs of BFloat16, split by place
//   round_to_bfloat16(x)                     to nearest even, still float32
//   transpose(rows)                          a LANES x LANES matrix in registers

#pragma once

#include <cstdint>

#define INLINE inline __attribute__((always_inline))

namespace vitslim {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace
}  // namespace vitslim

#if defined(VITSLIM_TARGET_AVX512)
#include "vec_avx512.h"
#elif defined(VITSLIM_TARGET_AVX2)
#include "vec_avx2.h"
#else
#include "vec_portable.h"
#endif

namespace vitslim {
namespace {

// 2^x; 0 for -inf, NaN for NaN. The polynomial approximates 2^f for 0 <= f < 1 and has, of all of
// degree 6, the smallest largest relative error, 2e-9: rounding adds 6e-8.
INLINE Vec exp2(Vec x) {
  const Vec f = fraction(x);
  Vec y = fma(broadcast(2.17022549e-4f), f, broadcast(1.24396884e-3f));
  y = fma(y, f, broadcast(9.67884064e-3f));
  y = fma(y, f, broadcast(5.54833412e-2f));
  y = fma(y, f, broadcast(2.4022983e-1f));
  y = fma(y, f, broadcast(6.93147004e-1f));
  y = fma(y, f, broadcast(1.0f));
  return scale_by_exp2_floor(y, x);
}

}  // namespace
}  // namespace vitslim
