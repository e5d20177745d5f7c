// Runs the CUDA kernels on the CPU against references in double.
//
//   emulated [WORDS]    the cases whose names begin with WORDS, all without

#include <chrono>
#include <cstdio>
#include <exception>

#include "cases.h"

int main(int argc, char** argv) {
  std::string words;
  for (int i = 1; i < argc; ++i) words += (i > 1 ? " " : "") + std::string(argv[i]);
  int run = 0, failed = 0;
  const auto start = std::chrono::steady_clock::now();
  for (const auto& cases :
       {emulated::ragged_attention_forward_cases(), emulated::ragged_attention_backward_cases(),
        emulated::gated_layer_norm_cases(), emulated::masked_mlp_cases(),
        emulated::column_sums_cases()}) {
    for (const emulated::Case& each : cases) {
      if (each.name.compare(0, words.size(), words) != 0) continue;
      ++run;
      try {
        each.run();
      } catch (const std::exception& error) {
        ++failed;
        std::printf("%s: %s\n", each.name.c_str(), error.what());
      }
    }
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("emulated: %d cases in %.1f s, %d failed\n", run, seconds.count(), failed);
  // A name that no case has must not look like success.
  return failed > 0 || run == 0;
}
