// Where a CUDA kernel runs, and how exactly it multiplies float32.

#pragma once

namespace vitslim {

struct Gpu {
  void* stream;  // a cudaStream_t of the current device
  // Tensor cores multiply 16-bit numbers. A float32 operand is the sum of so many bfloat16 numbers:
  // 3 keep all its bits, 2 keep 16 of them.
  int float32_parts;
};

}  // namespace vitslim
