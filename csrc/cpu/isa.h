// Which instruction set the CPU kernels use: the best the machine has, or the one a test asks for.

#pragma once

namespace vitslim {

enum class Isa { PORTABLE, AVX2, AVX512 };
constexpr int ISA_COUNT = 3;

const char* isa_name(Isa isa);
bool isa_available(Isa isa);

Isa current_isa();
void set_current_isa(Isa isa);  // must be available

}  // namespace vitslim
