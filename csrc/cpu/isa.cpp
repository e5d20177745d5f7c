#include "isa.h"

#include <atomic>

namespace vitslim {
namespace {

Isa best_isa() {
  if (isa_available(Isa::AVX512)) return Isa::AVX512;
  return isa_available(Isa::AVX2) ? Isa::AVX2 : Isa::PORTABLE;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa(best_isa());
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  return isa == Isa::AVX512 ? "avx512" : isa == Isa::AVX2 ? "avx2" : "portable";
}

bool isa_available(Isa isa) {
  if (isa == Isa::PORTABLE) return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == Isa::AVX2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa current_isa() { return chosen(); }
void set_current_isa(Isa isa) { chosen() = isa; }

}  // namespace vitslim
