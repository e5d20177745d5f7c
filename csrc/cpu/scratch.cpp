#include "scratch.h"

#include <cstdlib>
#include <new>

namespace vitslim {

float* thread_scratch(int64_t floats) {
  struct Memory {
    float* data = nullptr;
    int64_t floats = 0;
    ~Memory() { std::free(data); }
  };
  static thread_local Memory memory;
  if (memory.floats < floats || !memory.data) {
    std::free(memory.data);
    const size_t bytes = (size_t(floats) * sizeof(float) + 64) / 64 * 64;
    memory.data = static_cast<float*>(std::aligned_alloc(64, bytes));
    memory.floats = memory.data ? floats : 0;
    if (!memory.data) throw std::bad_alloc();
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory.data, size_t(memory.floats) * sizeof(float));
#endif
  return memory.data;
}

}  // namespace vitslim
