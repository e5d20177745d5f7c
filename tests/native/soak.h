// Many calls of a few shapes: memory does not grow, and nothing is allocated after the first call.

#pragma once

#include <cstdint>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#if defined(__linux__)
#include <unistd.h>
#endif

#include "allocations.h"
#include "hammer.h"

namespace stress {

// What a heap may shift about without a leak.
constexpr int64_t GROWTH_LIMIT = 256 * 1024;

// Bytes of the process in memory, or 0 where the system does not say.
inline int64_t resident_bytes() {
#if defined(__linux__)
  std::ifstream file("/proc/self/statm");
  int64_t all = 0, resident = 0;
  file >> all >> resident;
  return resident * sysconf(_SC_PAGESIZE);
#else
  return 0;
#endif
}

inline void run_soak(int64_t calls, uint64_t seed) {
  Random random(seed);
  const std::vector<Case> cases = random_cases(random, 6);
  Pool pool(2);
  std::vector<Exact<float>> outs;
  for (const Case& one : cases) outs.emplace_back(one.alone.size(), 0, UNWRITTEN);
  // Every shape once: later calls find all the memory they need.
  for (size_t i = 0; i < cases.size(); ++i) cases[i].run(outs[i], pool);

  int64_t early = 0, allocated = 0;
  for (int64_t call = 0; call < calls; ++call) {
    const size_t i = random.next() % cases.size();
    const int64_t before = allocations();
    cases[i].run(outs[i], pool);
    allocated += allocations() - before;
    if (call % 64 == 0)
      require(same_bits(outs[i].data(), cases[i].alone.data(), outs[i].size()),
              "call " + std::to_string(call) + " gave other bits: " + describe(cases[i].model));
    if (call == calls / 10) early = resident_bytes();
  }
  const int64_t growth = resident_bytes() - early;
  std::cout << "soak: " << calls << " calls of " << cases.size() << " shapes; resident "
            << early / 1024 << " KiB after a tenth, " << growth / 1024 << " KiB more at the end; "
            << (counts_allocations() ? std::to_string(allocated) : "uncounted")
            << " allocations after the first calls\n";
  require(growth <= GROWTH_LIMIT, "memory grew by " + std::to_string(growth) + " bytes");
  require(allocated == 0, std::to_string(allocated) + " allocations after the first calls");
}

}  // namespace stress
