// Products with packed weights, their bfloat16 products compiled for AMX.

#include "isa.h"

#if defined(VITSLIM_HAS_AMX_BF16)
#define VITSLIM_TARGET_AVX512
#define VITSLIM_TARGET_AMX_BF16
#include <cstring>

#include "packed_linear_kernels.h"
#include "targets.h"
// Behind targets.h, which decides what they become.
#include "packed_linear_amx.h"
// Behind the products.
#include "packed_linear_beside_avx512.h"

namespace vitslim {

const PackedLinearKernels packed_linear_amx_bf16 = BESIDE_AVX512;

}  // namespace vitslim

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // VITSLIM_HAS_AMX_BF16
