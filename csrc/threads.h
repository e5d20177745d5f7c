// How the caller lends its threads to a kernel.

#pragma once

#include <cstdint>

namespace vitslim {

// run(count, body, context) calls body(begin, end, context) on ranges that cover 0..count, at once
// or one after the other, and returns when all are done. Ranges that are called one after the other
// are few and long: a kernel whose threads wait for each other relies on that two calls are either
// at work at the same time or one range.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
struct Threads {
  int64_t count;
  void (*run)(int64_t count, ParallelBody body, void* context);
};

}  // namespace vitslim
