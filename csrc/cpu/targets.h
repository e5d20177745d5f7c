// Compiles all that follows in this file for the target named by VITSLIM_TARGET_AVX512 or
// VITSLIM_TARGET_AVX2, or for the compiler's own default. Beside VITSLIM_TARGET_AVX512,
// VITSLIM_TARGET_AVX512_BF16 and VITSLIM_TARGET_AMX_BF16 add their instructions. Include it after
// the headers of the standard library, whose functions must stay runnable on every machine.

#pragma once

#if defined(VITSLIM_TARGET_AVX512) || defined(VITSLIM_TARGET_AVX2)
#include <immintrin.h>
#endif

#if defined(VITSLIM_TARGET_AMX_BF16) && defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((                                                                                \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16"))), \
    apply_to = function)
#elif defined(VITSLIM_TARGET_AMX_BF16)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#elif defined(VITSLIM_TARGET_AVX512_BF16) && defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#elif defined(VITSLIM_TARGET_AVX512_BF16)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#elif defined(VITSLIM_TARGET_AVX512) && defined(__clang__)
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
