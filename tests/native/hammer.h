// Several host threads at once, each with a pool of its own, as several Python threads would call.

#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "fuzz.h"

namespace stress {

// A model, a batch and what comes out when nothing else runs.
struct Case {
  Model model;
  PackedModel packed;
  int64_t batch;
  Exact<float> images, alone;

  Case(Random& random, const Limits& limits)
      : model(random_model(random, limits)),
        packed(pack(model)),
        batch(random.between(1, 5)),
        images(batch * model.image_elements()),
        alone(batch * model.rows * model.embed_dim) {
    for (float& pixel : images) pixel = float(random.normal());
    Pool pool(1);
    run(alone, pool);
  }

  void run(Exact<float>& out, Pool& pool) const {
    encode(packed, images.data(), batch, out.data(), pool.threads());
  }
};

inline std::vector<Case> random_cases(Random& random, int64_t count) {
  std::vector<Case> cases;
  cases.reserve(count);
  for (int64_t i = 0; i < count; ++i) cases.emplace_back(random, Limits{60, 3, 30, 70, 40, 2});
  return cases;
}

// Calls random cases until the time is over. A host thread meets models that others use as well.
inline int64_t hammer(const std::vector<Case>& cases, uint64_t seed,
                      std::chrono::steady_clock::time_point end) {
  Random random(seed);
  Pool pool(random.between(1, 3), random.pick({Cut::EVEN, Cut::ANY}), seed);
  int64_t calls = 0;
  while (std::chrono::steady_clock::now() < end) {
    const int64_t i = random.between(0, int64_t(cases.size()) - 1);
    Exact<float> out(cases[i].alone.size(), 0, UNWRITTEN);
    cases[i].run(out, pool);
    require(same_bits(out.data(), cases[i].alone.data(), out.size()),
            "not the bits it gives alone: " + describe(cases[i].model));
    ++calls;
  }
  return calls;
}

// Returns the number of calls.
inline int64_t run_threads(double seconds, uint64_t seed) {
  using Clock = std::chrono::steady_clock;
  Random random(seed);
  const std::vector<Case> cases = random_cases(random, 6);
  const auto end = Clock::now() + std::chrono::milliseconds(int64_t(1000 * seconds));
  std::atomic<int64_t> calls{0};
  std::exception_ptr failure;
  std::mutex mutex;
  // Host threads come and go, and with them the memory that kernels keep for each.
  while (Clock::now() < end && !failure) {
    const auto pause = std::min(end, Clock::now() + std::chrono::milliseconds(700));
    std::vector<std::thread> hosts;
    for (int host = 0; host < 3; ++host)
      hosts.emplace_back([&, host_seed = random.next()] {
        try {
          calls += hammer(cases, host_seed, pause);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          failure = std::current_exception();
        }
      });
    for (std::thread& host : hosts) host.join();
  }
  if (failure) std::rethrow_exception(failure);
  return calls;
}

}  // namespace stress
