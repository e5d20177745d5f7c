// The sums of the columns of matrix [rows, columns] float32.
//
// A block has some neighbouring columns; its threads walk down the rows side by side, and what they
// have added up meets in shared memory, halved until one row is left. One level is enough: the
// matrices are parts of gradients, of at most some thousand rows, and lie in the L2 cache.

#include "../column_sums.h"
#include "launch.cuh"

namespace vitslim {
namespace {

constexpr int THREADS = 256;
// Loads of one thread in flight: it has a sum of every fourth of its rows.
constexpr int PENDING = 4;

// 8 columns are a sector of memory, the least that is worth reading; that spreads few columns over
// many multiprocessors. The order of the sums depends on the shape alone.
int columns_of_block(int64_t columns) { return columns <= 4096 ? 8 : 32; }

template <typename E>
__global__ void __launch_bounds__(THREADS, 4)
    column_sums_kernel(const float* matrix,  // [rows, columns], rows `stride` apart
                       int64_t rows, int64_t columns, int64_t stride,
                       int width,                             // columns of a block, a power of two
                       E* sums) {                             // [columns]
  float* shared = reinterpret_cast<float*>(shared_memory());  // [THREADS / width, width]
  const int thread = int(threadIdx.x), step = THREADS / width;
  const int64_t column = int64_t(blockIdx.x) * width + thread % width;
  float parts[PENDING] = {};
  if (column < columns) {
    const float* from = matrix + column;
    for (int64_t row = thread / width; row < rows; row += PENDING * step) {
#pragma unroll
      for (int i = 0; i < PENDING; ++i)
        if (row + i * step < rows) parts[i] += from[(row + i * step) * stride];
    }
  }
  shared[thread] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  for (int half = THREADS / 2; half >= width; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] += shared[thread + half];
  }
  // The last to add to a column's sum was its own thread.
  if (thread < width && column < columns) sums[column] = from_float<E>(shared[thread]);
}

template <typename E>
void run(const ColumnSums& call, const Gpu& gpu) {
  const int width = columns_of_block(call.columns);
  const Grid grid{(call.columns + width - 1) / width, THREADS, THREADS * int64_t(sizeof(float))};
  launch(
      "column_sums_kernel", column_sums_kernel<E>, grid, gpu,
      [&](std::ostream& out) { out << call.rows << " rows, " << call.columns << " columns"; },
      call.matrix, call.rows, call.columns, call.stride, width, static_cast<E*>(call.sums));
}

}  // namespace

void column_sums_cuda(const ColumnSums& call, const Gpu& gpu) {
  if (call.dtype == DType::FLOAT32) return run<float>(call, gpu);
  if (call.dtype == DType::BFLOAT16) return run<BFloat16>(call, gpu);
  run<Half>(call, gpu);
}

}  // namespace vitslim
