// The number types that kernels read and write.

#pragma once

namespace vitslim {

enum class DType { FLOAT32, BFLOAT16, FLOAT16 };

}  // namespace vitslim
