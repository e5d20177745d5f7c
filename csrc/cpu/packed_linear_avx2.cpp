// Products with packed weights and layer norm, compiled for AVX2.

#if defined(__x86_64__)
#define VITSLIM_TARGET_AVX2
#include "packed_linear_kernels.h"
#include "targets.h"
// Behind targets.h, which decides what they become.
#include "layer_norm.h"
#include "packed_linear_product.h"
#include "peak_registers.h"

namespace vitslim {

const PackedLinearKernels packed_linear_avx2 = {product_scratch, multiply_panels, normalise,
                                                multiply_adds};

}  // namespace vitslim

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
