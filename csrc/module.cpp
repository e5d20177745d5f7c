// vitslim._C: the Python module, which tells what was built and which instruction set runs.
//
// The ops themselves are registered with torch, in the library `vitslim_native`: see csrc/torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "peak.h"

#ifndef VITSLIM_SANITIZE
#define VITSLIM_SANITIZE ""
#endif
// For which GPUs CUDA kernels are in, "8.0,9.0+PTX"; nothing without CUDA.
#ifndef VITSLIM_CUDA_ARCHITECTURES
#define VITSLIM_CUDA_ARCHITECTURES ""
#endif

namespace {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (int i = vitslim::ISA_COUNT - 1; i >= 0; --i)
    if (vitslim::isa_available(vitslim::Isa(i))) names.push_back(isa_name(vitslim::Isa(i)));
  return names;
}

void set_instruction_set(const std::string& name) {
  for (int i = 0; i < vitslim::ISA_COUNT; ++i) {
    const vitslim::Isa isa = vitslim::Isa(i);
    if (name == isa_name(isa) && isa_available(isa)) return set_current_isa(isa);
  }
  std::string names;
  for (const std::string& available : instruction_sets())
    names += (names.empty() ? "" : ", ") + available;
  throw std::invalid_argument("instruction set '" + name + "' is not available here; there are " +
                              names + ".");
}

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["cuda_architectures"] = VITSLIM_CUDA_ARCHITECTURES;
  info["sanitizers"] = VITSLIM_SANITIZE;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "vitslim's native kernels; use vitslim.native, which imports torch first.";
  m.def("build_info", &build_info,
        "The compiler, the GPUs that are built for, and the sanitizers.");
  m.def(
      "num_threads", [] { return torch::stable::get_num_threads(); },
      "How many threads torch lends to a kernel.");
  m.def("instruction_sets", &instruction_sets, "What this machine can run, best first.");
  m.def(
      "instruction_set", [] { return std::string(isa_name(vitslim::current_isa())); },
      "What the CPU kernels use now.");
  m.def("set_instruction_set", &set_instruction_set, pybind11::arg("name"),
        "Makes the CPU kernels use one of instruction_sets(), for tests.");
  m.def("multiply_add_rate", &vitslim::multiply_add_rate, pybind11::arg("seconds"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Multiply-adds a second of one thread on registers alone.");
}
