// Counts what the program takes from the heap.

#pragma once

#include <cstdint>

namespace stress {

// False where the heap belongs to a sanitizer or to a C library whose functions cannot be replaced.
bool counts_allocations();

// How often the heap has been asked for memory, by any thread.
int64_t allocations();

}  // namespace stress
