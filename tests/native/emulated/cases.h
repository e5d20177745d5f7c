// What main.cpp runs: every file of cases gives its own.

#pragma once

#include <functional>
#include <string>
#include <vector>

namespace emulated {

struct Case {
  std::string name;           // "small ..." where ThreadSanitizer, far slower, runs it too
  std::function<void()> run;  // throws where the kernel is wrong
};

std::vector<Case> ragged_attention_forward_cases();
std::vector<Case> ragged_attention_backward_cases();
std::vector<Case> gated_layer_norm_cases();
std::vector<Case> masked_mlp_cases();
std::vector<Case> column_sums_cases();

}  // namespace emulated
