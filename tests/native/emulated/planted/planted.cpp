// A kernel with faults of choice, to show that the emulation and the sanitizers see them:
//
//   planted none      reverses every row of a matrix through shared memory, and compares
//   planted race      no barrier between writing and reading: ThreadSanitizer, or (turns) compare
//   planted overrun   a row beyond the matrix is read: AddressSanitizer
//   planted shared    a row beyond shared memory is written: AddressSanitizer
//   planted early     an asynchronous copy is read before it was waited for: the comparison
//   planted lost      one thread leaves before the barrier: the emulation

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../../../csrc/cuda/launch.cuh"
#include "../../exact.h"

namespace {

constexpr int ROWS = 64, WIDTH = 8;
enum Fault { NONE, RACE, OVERRUN, SHARED, EARLY, LOST };
const char* const NAMES[] = {"none", "race", "overrun", "shared", "early", "lost"};

// x, y: [ROWS, WIDTH]. A thread copies a row, and writes that of its mirror image.
__global__ void __launch_bounds__(ROWS, 1)
    reverse_kernel(const vitslim::Half* x, vitslim::Half* y, Fault fault) {
  const int row = int(threadIdx.x);
  unsigned char* const shared = vitslim::shared_memory();
  vitslim::copy_async(shared + (row + (fault == SHARED)) * 16,
                      x + (row + (fault == OVERRUN)) * WIDTH, 16);
  vitslim::copy_async_commit();
  if (fault != EARLY) vitslim::copy_async_wait<0>();
  if (fault == LOST && row == 0) return;
  if (fault != RACE) __syncthreads();
  std::memcpy(y + row * WIDTH, shared + (ROWS - 1 - row) * 16, 16);
}

}  // namespace

int main(int argc, char** argv) {
  int fault = 0;
  while (fault < 6 && (argc != 2 || std::string(argv[1]) != NAMES[fault])) ++fault;
  if (fault == 6) return std::fputs("planted none|race|overrun|shared|early|lost\n", stderr), 2;
  // The heap gives multiples of 16, as copies of 16 bytes need.
  stress::Exact<vitslim::Half> x(ROWS * WIDTH), y(ROWS * WIDTH);
  for (int i = 0; i < ROWS * WIDTH; ++i) x[i].bits = uint16_t(i);
  vitslim::launch(
      "reverse", reverse_kernel, {1, ROWS, ROWS * 16}, {nullptr, 3},
      [](auto& sentence) { sentence << "64 rows"; }, x.data(), y.data(), Fault(fault));
  for (int i = 0; i < ROWS * WIDTH; ++i)
    if (y[i].bits != (ROWS - 1 - i / WIDTH) * WIDTH + i % WIDTH)
      return std::puts("wrong numbers"), 3;
  return std::puts("right numbers"), 0;
}
