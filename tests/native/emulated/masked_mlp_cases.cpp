// The activations of masked_mlp, and their gradients, against their formulas in double.

#include <cstring>

#include "../../../csrc/masked_mlp.h"
#include "cases.h"
#include "compare.h"

namespace emulated {
namespace {

using stress::Exact;
using vitslim::Activation;
using vitslim::BFloat16;
using vitslim::Gpu;
using vitslim::Half;

constexpr struct {
  Activation activation;
  const char* name;
} ACTIVATIONS[] = {{Activation::GELU, "gelu"},
                   {Activation::GELU_TANH, "gelu_tanh"},
                   {Activation::QUICK_GELU, "quick_gelu"},
                   {Activation::SILU, "silu"},
                   {Activation::RELU, "relu"}};

struct Value {
  double value, slope;
};

Value gated(double u, double slope) {
  const double gate = 1 / (1 + std::exp(-slope * u));
  return {u * gate, gate * (1 + slope * u * (1 - gate))};
}

Value activate(Activation activation, double u) {
  const double pi = 3.14159265358979323846, root = std::sqrt(2 / pi);
  switch (activation) {
    case Activation::GELU: {
      const double normal = 0.5 * std::erfc(-u / std::sqrt(2.0));
      return {u * normal, normal + u * std::exp(-0.5 * u * u) / std::sqrt(2 * pi)};
    }
    case Activation::GELU_TANH: {
      const double tanh = std::tanh(root * (u + 0.044715 * u * u * u));
      return {0.5 * u * (1 + tanh),
              0.5 * (1 + tanh) + 0.5 * u * (1 - tanh * tanh) * root * (1 + 3 * 0.044715 * u * u)};
    }
    case Activation::QUICK_GELU:
      return gated(u, 1.702);
    case Activation::SILU:
      return gated(u, 1.0);
    default:
      return {u <= 0 ? 0 : u, u > 0 ? 1.0 : 0.0};
  }
}

struct Size {
  int64_t rows, units;
  int64_t shift = 0;  // elements before all arrays
  bool mask = true, in_place = false;
};

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

template <typename T>
bool same_bits(const Exact<T>& a, const Exact<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), size_t(a.size()) * sizeof(T)) == 0;
}

template <typename E>
struct Problem {
  Size size;
  vitslim::MaskedActivation what;
  Exact<E> pre_act, grad_hidden;
  Exact<float> mask;

  Problem(const Size& s, Activation activation) : size(s) {
    stress::Random random(s.rows * 10000 + s.units);
    pre_act = random_numbers<E>(s.rows * s.units, random, 2, s.shift);
    // From the tails too.
    for (int64_t i = 3; i < pre_act.size(); i += 17)
      pre_act[i] = vitslim::from_float<E>(float(15 * random.normal()));
    if (pre_act.size() > 5) pre_act[5] = vitslim::from_float<E>(0.0f);
    grad_hidden = random_numbers<E>(s.rows * s.units, random, 1, s.shift);
    mask = random_numbers<float>(s.units, random, 1, s.shift);
    for (int64_t c = 2; c < s.units; c += 5) mask[c] = 0;
    what = {s.rows, s.units, DTYPE<E>, activation, s.mask ? mask.data() : nullptr};
  }
  Problem(const Problem&) = delete;
};

template <typename E>
Exact<E> forward(const Problem<E>& p) {
  Exact<E> hidden = unwritten<E>(p.pre_act.size(), p.size.shift);
  const int64_t before = launches;
  vitslim::masked_activation_forward_cuda({p.what, p.pre_act.data(), hidden.data()},
                                          Gpu{nullptr, 3});
  require(launches - before == (hidden.size() > 0), "forward is one launch");
  return hidden;
}

template <typename E>
struct Backward {
  Exact<E> grad_pre_act, hidden;
  Exact<float> sums;

  explicit Backward(const Problem<E>& p)
      : grad_pre_act(p.size.in_place ? p.grad_hidden
                                     : unwritten<E>(p.pre_act.size(), p.size.shift)),
        hidden(unwritten<E>(p.pre_act.size(), p.size.shift)) {
    const Gpu gpu{nullptr, 3};
    const int64_t parts = vitslim::masked_activation_sum_rows_cuda(p.what, gpu);
    sums = unwritten<float>(parts * 2 * p.size.units);
    const int64_t before = launches;
    vitslim::masked_activation_backward_cuda(
        {p.what, p.size.in_place ? grad_pre_act.data() : p.grad_hidden.data(), p.pre_act.data(),
         grad_pre_act.data(), hidden.data(), sums.data()},
        gpu);
    require(launches - before == (hidden.size() > 0), "backward is one launch");
  }
};

template <typename E>
void check(Activation activation, const Size& size) {
  const Problem<E> p(size, activation);
  std::vector<double> hidden, grad_pre_act, sums(2 * size.units), actual(2 * size.units);
  for (int64_t i = 0; i < p.pre_act.size(); ++i) {
    const int64_t unit = i % size.units;
    const Value act = activate(activation, vitslim::to_float(p.pre_act[i]));
    const double z = size.mask ? p.mask[unit] : 1.0, upper = vitslim::to_float(p.grad_hidden[i]);
    hidden.push_back(z * act.value);
    grad_pre_act.push_back(upper * z * act.slope);
    sums[unit] += upper * z * act.slope;
    sums[size.units + unit] += upper * act.value;
  }
  require_close(exact(forward(p)), hidden, TOLERANCE<E>, "hidden");
  const Backward<E> backward(p), again(p);
  require_close(exact(backward.hidden), hidden, TOLERANCE<E>, "backward's hidden");
  require_close(exact(backward.grad_pre_act), grad_pre_act, TOLERANCE<E>, "grad_pre_act");
  for (int64_t i = 0; i < backward.sums.size(); ++i)
    actual[i % (2 * size.units)] += backward.sums[i];
  require_close(actual, sums, TOLERANCE<float>, "sums");
  require(
      same_bits(backward.sums, again.sums) && same_bits(backward.grad_pre_act, again.grad_pre_act),
      "another run gives other bits");
}

void check_dtypes(Activation activation, const Size& size) {
  check<float>(activation, size);
  check<BFloat16>(activation, size);
  check<Half>(activation, size);
}

// NaN reaches its own number, and the sums of its column.
void check_nan(Activation activation) {
  const Size size{9, 40};
  Problem<float> p(size, activation);
  const int64_t broken = 5 * size.units + 17;
  p.pre_act[broken] = NAN;
  const Exact<float> hidden = forward(p);
  const Backward<float> backward(p);
  const bool relu = activation == Activation::RELU;  // whose slope is 0 at NaN, as PyTorch's
  for (int64_t i = 0; i < hidden.size(); ++i) {
    require(std::isnan(hidden[i]) == (i == broken), "NaN is not where it was in hidden");
    require(std::isnan(backward.grad_pre_act[i]) == (i == broken && !relu),
            "NaN is not where it was in grad_pre_act");
  }
  for (int64_t i = 0; i < backward.sums.size(); ++i) {
    const int64_t column = i % (2 * size.units);
    if (std::isnan(backward.sums[i]))
      require(column == 17 || column == size.units + 17, "NaN reaches another column's sum");
  }
}

// What cannot be held by exp: limits, not NaN.
void check_limits(Activation activation) {
  Problem<float> p({1, 8, 0, false}, activation);
  const float numbers[] = {-1e4f, -300.0f, -90.0f, -20.0f, 20.0f, 90.0f, 300.0f, 1e4f};
  std::copy_n(numbers, 8, p.pre_act.begin());
  std::fill(p.grad_hidden.begin(), p.grad_hidden.end(), 1.0f);
  const Backward<float> backward(p);
  for (int i = 0; i < 8; ++i) {
    const float positive = numbers[i] > 0 ? 1.0f : 0.0f;
    require(std::abs(backward.hidden[i] - positive * numbers[i]) < 1e-5f, "a limit of the value");
    require(std::abs(backward.grad_pre_act[i] - positive) < 1e-5f, "a limit of the slope");
  }
}

void check_none() {
  const Problem<float> p({1, 8}, Activation::NONE);
  bool refused = false;
  try {
    forward(p);
  } catch (const std::runtime_error&) {
    refused = true;
  }
  require(refused, "Activation::NONE is not refused");
}

// One multiprocessor: its blocks have more rows than they hold at a time.
void check_many_rows(const Size& size) {
  machine.processors = 1;
  check_dtypes(Activation::GELU, size);
  machine.processors = Machine().processors;
}

}  // namespace

std::vector<Case> masked_mlp_cases() {
  std::vector<Case> cases;
  const auto add = [&](const std::string& name, const Size& size) {
    cases.push_back({name, [size] { check_dtypes(Activation::GELU, size); }});
  };
  for (const auto& each : ACTIVATIONS) {
    const Activation activation = each.activation;
    const std::string name = std::string("masked_mlp, ") + each.name;
    cases.push_back({"small " + name, [activation] { check_dtypes(activation, {21, 40}); }});
    cases.push_back(
        {name + ", odd units", [activation] { check_dtypes(activation, {21, 37, 1}); }});
    cases.push_back({name + ", NaN", [activation] { check_nan(activation); }});
    cases.push_back({name + ", limits", [activation] { check_limits(activation); }});
  }
  for (const int64_t units : {1, 7, 8, 31, 64, 100, 192, 250, 264, 384, 520})
    add("masked_mlp, units " + std::to_string(units), {9, units});
  add("masked_mlp, one row", {1, 256});
  add("masked_mlp, nothing is aligned", {9, 256, 1});
  add("small masked_mlp, in place", {37, 64, 0, true, true});
  add("masked_mlp, in place and nothing is aligned", {37, 64, 3, true, true});
  add("masked_mlp, no mask", {9, 72, 0, false});
  add("small masked_mlp, no rows", {0, 64});
  add("small masked_mlp, no units", {5, 0});
  cases.push_back({"small masked_mlp, no activation", check_none});
  for (const Size& size : {Size{200, 264}, Size{700, 32}, Size{203, 64, 0, true, true},
                           Size{203, 65}, Size{130, 1100}})
    cases.push_back({"masked_mlp, many rows of units " + std::to_string(size.units),
                     [size] { check_many_rows(size); }});
  return cases;
}

}  // namespace emulated
