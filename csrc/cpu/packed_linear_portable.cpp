// Products with packed weights and layer norm, compiled for the compiler's default target.

#include "packed_linear_kernels.h"
// Behind targets.h, which decides what they become.
#include "layer_norm.h"
#include "packed_linear_product.h"
#include "peak_registers.h"

namespace vitslim {

const PackedLinearKernels packed_linear_portable = {product_scratch, multiply_panels, normalise,
                                                    multiply_adds};

}  // namespace vitslim
