// The CPU kernels under random cases, without Python:
//
//   stress fuzz COUNT SEED [ISA]     random models and layers against a reference in double
//   stress broken COUNT SEED         models whose arrays do not fit each other
//   stress threads SECONDS SEED      several host threads at once
//   stress soak CALLS SEED           many calls; memory does not grow
//
// Case i of fuzz and broken has the seed SEED + i, so that a failure is repeated alone by
// `stress fuzz 1 <its seed>`. The exit status is 1 after a failure.

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "broken.h"
#include "death.h"
#include "fuzz.h"
#include "fuzz_parts.h"
#include "hammer.h"
#include "soak.h"

namespace stress {
namespace {

// The available instruction sets, or the one of that name.
std::vector<vitslim::Isa> instruction_sets(const std::string& name) {
  std::vector<vitslim::Isa> isas;
  for (int i = 0; i < vitslim::ISA_COUNT; ++i) {
    const auto isa = vitslim::Isa(i);
    if (vitslim::isa_available(isa) && (name.empty() || name == vitslim::isa_name(isa)))
      isas.push_back(isa);
  }
  require(!isas.empty(), "this machine has no instruction set " + name);
  return isas;
}

// Calls one(seed, what) for COUNT seeds, and names the one that fails; `what` describes the case.
template <typename One>
void for_each_seed(const char* command, int64_t count, uint64_t first, const One& one) {
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t seed = first + uint64_t(i);
    begin_case(command, seed);
    std::string what;
    try {
      one(seed, what);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(error.what()) + "\n  " + what +
                               "\n  the same again: stress " + command + " 1 " +
                               std::to_string(seed));
    }
  }
}

void run_fuzz(int64_t count, uint64_t seed, const std::string& isa_name) {
  const std::vector<vitslim::Isa> isas = instruction_sets(isa_name);
  Pools pools;
  double encoder = 0, linear = 0, attention = 0;
  for_each_seed("fuzz", count, seed, [&](uint64_t seed, std::string& what) {
    linear = std::max(linear, fuzz_linear(seed, isas, pools, what));
    attention = std::max(attention, fuzz_attention(seed, isas, pools, what));
    encoder = std::max(encoder, fuzz_encoder(seed, isas, pools, what));
  });
  std::cout << "fuzz: " << count << " encoders, linear layers and attentions in";
  for (const vitslim::Isa isa : isas) std::cout << " " << vitslim::isa_name(isa);
  std::cout << "; the largest error took " << encoder << ", " << linear << " and " << attention
            << " of its budget\n";
}

void run_broken(int64_t count, uint64_t seed) {
  Pools pools;
  BrokenCount outcome;
  for_each_seed("broken", count, seed,
                [&](uint64_t seed, std::string& what) { fuzz_broken(seed, pools, what, outcome); });
  std::cout << "broken: " << outcome.refused << " refused, " << outcome.computed << " computed\n";
}

int run(const std::vector<std::string>& words) {
  if (words.size() < 3 || words.size() > 4) {
    std::cerr << "usage: stress fuzz|broken|threads|soak COUNT SEED [ISA]\n";
    return 2;
  }
  const std::string& command = words[0];
  const double count = std::atof(words[1].c_str());
  const uint64_t seed = std::strtoull(words[2].c_str(), nullptr, 10);
  if (command == "fuzz")
    run_fuzz(int64_t(count), seed, words.size() > 3 ? words[3] : "");
  else if (command == "broken")
    run_broken(int64_t(count), seed);
  else if (command == "threads")
    std::cout << "threads: " << run_threads(count, seed) << " calls\n";
  else if (command == "soak")
    run_soak(int64_t(count), seed);
  else {
    std::cerr << "stress knows no command " << command << "\n";
    return 2;
  }
  return 0;
}

}  // namespace
}  // namespace stress

int main(int count, char** words) {
  stress::watch_for_death();
  try {
    return stress::run(std::vector<std::string>(words + 1, words + count));
  } catch (const std::exception& error) {
    std::cerr << "FAILED: " << error.what() << "\n";
    return 1;
  }
}
