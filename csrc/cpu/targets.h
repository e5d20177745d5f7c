// Compiles all that follows in this file for the target named by VITSLIM_TARGET_AVX512 or
// VITSLIM_TARGET_AVX2, or for the compiler's own default. Include it after the headers of the
// standard library, whose functions must stay runnable on every machine.

#pragma once

#if defined(VITSLIM_TARGET_AVX512) || defined(VITSLIM_TARGET_AVX2)
#include <immintrin.h>
#endif

#if defined(VITSLIM_TARGET_AVX512) && defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#elif defined(VITSLIM_TARGET_AVX512)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#elif defined(VITSLIM_TARGET_AVX2) && defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(VITSLIM_TARGET_AVX2)
#pragma GCC target("avx2,fma,f16c")
#endif
