// The sums of a matrix's columns, always in the same order and so always the same.

#pragma once

#include <cstdint>

#include "dtype.h"
#include "gpu.h"

namespace vitslim {

struct ColumnSums {
  const float* matrix;  // [rows, columns], rows `stride` apart
  int64_t rows, columns, stride;
  void* sums;   // [columns]
  DType dtype;  // of sums
};

void column_sums_cuda(const ColumnSums& call, const Gpu& gpu);

}  // namespace vitslim
