// Which instruction set the CPU kernels use: the best the machine has, or the one a test asks for.

#pragma once

// What only some compilers know; the units of these levels are empty without.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define VITSLIM_HAS_AVX512_BF16
#endif
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define VITSLIM_HAS_AMX_BF16
#endif

namespace vitslim {

// From the least to the most: each can all that those before it can. The last two differ from
// AVX512 in products of bfloat16 pairs only.
enum class Isa { PORTABLE, AVX2, AVX512, AVX512_BF16, AMX_BF16 };
constexpr int ISA_COUNT = 5;

const char* isa_name(Isa isa);
bool isa_available(Isa isa);

Isa current_isa();
void set_current_isa(Isa isa);  // must be available

}  // namespace vitslim
