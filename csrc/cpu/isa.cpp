#include "isa.h"

#include <atomic>

#if defined(VITSLIM_HAS_AMX_BF16) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vitslim {
namespace {

// The tiles' kernel was proven with emulated tiles alone, so it has to be asked for.
Isa best_isa() {
  Isa best = Isa::AVX512_BF16;
  while (!isa_available(best)) best = Isa(int(best) - 1);
  return best;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa(best_isa());
  return isa;
}

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

bool has_avx512_bf16() {
#if defined(VITSLIM_HAS_AVX512_BF16)
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

#if defined(VITSLIM_HAS_AMX_BF16) && defined(__linux__)
// Linux makes room for the contents of the tiles only in a process that asked for it; from then on
// all its threads may use them. Where the kernel or the hypervisor has no tiles it refuses.
bool tiles_permitted() {
  constexpr long REQUEST = 0x1023;  // ARCH_REQ_XCOMP_PERM, which old headers do not have
  constexpr long TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

bool has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bfloat16 = d >> 22 & 1, tiles = d >> 24 & 1;
  return bfloat16 && tiles && tiles_permitted();
}
#else
bool has_tiles() { return false; }
#endif

bool has_amx_bf16() {
  static const bool has = has_avx512_bf16() && has_tiles();
  return has;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::AMX_BF16:
      return "amx-bf16";
    case Isa::AVX512_BF16:
      return "avx512-bf16";
    case Isa::AVX512:
      return "avx512";
    case Isa::AVX2:
      return "avx2";
    default:
      return "portable";
  }
}

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::AMX_BF16:
      return has_amx_bf16();
    case Isa::AVX512_BF16:
      return has_avx512_bf16();
#if defined(__x86_64__)
    case Isa::AVX512:
      return has_avx512();
    case Isa::AVX2:
      return has_avx2();
#endif
    default:
      return isa == Isa::PORTABLE;
  }
}

Isa current_isa() { return chosen(); }
void set_current_isa(Isa isa) { chosen() = isa; }

}  // namespace vitslim
