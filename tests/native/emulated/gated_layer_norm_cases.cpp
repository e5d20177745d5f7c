// gated_layer_norm against its formulas in double.

#include <cstring>

#include "../../../csrc/gated_layer_norm.h"
#include "cases.h"
#include "compare.h"

namespace emulated {
namespace {

using stress::Exact;
using stress::Random;
using vitslim::BFloat16;
using vitslim::GatedLayerNormShape;
using vitslim::Gpu;
using vitslim::Half;

struct Layout {
  int64_t shift = 0;       // elements before all arrays, so that nothing is aligned
  int64_t padding = 0;     // elements between the rows of x and G
  bool broadcast = false;  // x is the same for all images, G for all tokens
};

struct Size {
  int64_t batch, tokens, channels;
  Layout layout;
  bool gate = true;
  double mean = 0, spread = 1, eps = 1e-6, tolerance = 0;
};

template <typename T>
bool same_bits(const Exact<T>& a, const Exact<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), size_t(a.size()) * sizeof(T)) == 0;
}

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

// A call's arrays, and the answers in double.
template <typename E, typename W>
struct Problem {
  Size size;
  int64_t rows, grad_batch_stride, grad_token_stride;
  GatedLayerNormShape shape;
  Exact<E> x, grad_out;
  Exact<W> weight, bias;
  Exact<float> gate;

  Problem(const Size& s, uint64_t seed) : size(s), rows(s.batch * s.tokens) {
    Random random(seed);
    const int64_t row = s.channels + s.layout.padding, image = row * s.tokens;
    const int64_t shift = s.layout.shift;
    shape = {s.batch, s.tokens, s.channels, DTYPE<E>, DTYPE<W>, s.layout.broadcast ? 0 : image,
             row};
    grad_batch_stride = s.layout.broadcast ? row : image;
    grad_token_stride = s.layout.broadcast ? 0 : row;
    // Nothing behind the last row that is read.
    const auto length = [&](int64_t batch_stride, int64_t token_stride) {
      return rows == 0 ? 0
                       : (s.batch - 1) * batch_stride + (s.tokens - 1) * token_stride + s.channels;
    };
    x = random_numbers<E>(length(shape.x_batch_stride, row), random, s.spread, shift);
    for (E& each : x) each = vitslim::from_float<E>(float(s.mean + vitslim::to_float(each)));
    grad_out = random_numbers<E>(length(grad_batch_stride, grad_token_stride), random, 1, shift);
    weight = random_numbers<W>(s.channels, random, 1, shift);
    bias = random_numbers<W>(s.channels, random, 1, shift);
    gate = random_numbers<float>(s.tokens, random, 1, shift);
    for (int64_t t = 2; t < s.tokens; t += 3) gate[t] = 0;
  }

  double x_at(int64_t row, int64_t c) const {
    return vitslim::to_float(
        x[row / size.tokens * shape.x_batch_stride + row % size.tokens * shape.x_token_stride + c]);
  }
  double grad_at(int64_t row, int64_t c) const {
    return vitslim::to_float(grad_out[row / size.tokens * grad_batch_stride +
                                      row % size.tokens * grad_token_stride + c]);
  }
  double gate_at(int64_t row) const { return size.gate ? gate[row % size.tokens] : 1.0; }
};

template <typename E>
struct Forward {
  Exact<E> out;
  Exact<float> mean, rstd;

  template <typename W>
  explicit Forward(const Problem<E, W>& p)
      : out(unwritten<E>(p.rows * p.size.channels, p.size.layout.shift)),
        mean(unwritten<float>(p.rows)),
        rstd(unwritten<float>(p.rows)) {
    const int64_t before = launches;
    vitslim::gated_layer_norm_forward_cuda(
        {p.shape, p.x.data(), p.weight.data(), p.bias.data(), float(p.size.eps),
         p.size.gate ? p.gate.data() : nullptr, out.data(), mean.data(), rstd.data()},
        Gpu{nullptr, 3});
    require(launches - before == (out.size() > 0), "forward is one launch");
  }
};

template <typename E>
struct Backward {
  Exact<E> grad_x;
  Exact<float> grad_affine, grad_gate;

  template <typename W>
  Backward(const Problem<E, W>& p, const Forward<E>& saved)
      : grad_x(unwritten<E>(p.rows * p.size.channels, p.size.layout.shift)),
        grad_gate(unwritten<float>(p.size.gate ? p.rows : 0)) {
    const Gpu gpu{nullptr, 3};
    const int64_t parts = vitslim::gated_layer_norm_grad_affine_rows_cuda(p.shape, gpu);
    grad_affine = unwritten<float>(parts * 2 * p.size.channels);
    const int64_t before = launches;
    vitslim::gated_layer_norm_backward_cuda(
        {p.shape, p.grad_out.data(), p.grad_batch_stride, p.grad_token_stride, p.x.data(),
         p.weight.data(), p.bias.data(), p.size.gate ? p.gate.data() : nullptr, saved.mean.data(),
         saved.rstd.data(), grad_x.data(), grad_affine.data(),
         p.size.gate ? grad_gate.data() : nullptr},
        gpu);
    const int64_t expected = grad_x.size() == 0 ? 0 : p.size.channels > 3072 ? 2 : 1;
    require(launches - before == expected, "backward is one launch, two for long rows");
  }
};

template <typename E, typename W>
void check_forward(const Problem<E, W>& p, const Forward<E>& actual) {
  const int64_t channels = p.size.channels;
  std::vector<double> out, means, rstds;
  if (channels == 0) return;  // nothing is written
  for (int64_t row = 0; row < p.rows; ++row) {
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < channels; ++c) mean += p.x_at(row, c) / double(channels);
    for (int64_t c = 0; c < channels; ++c)
      variance += std::pow(p.x_at(row, c) - mean, 2) / double(channels);
    const double rstd = 1 / std::sqrt(variance + p.size.eps);
    means.push_back(mean);
    rstds.push_back(rstd);
    for (int64_t c = 0; c < channels; ++c)
      out.push_back(((p.x_at(row, c) - mean) * rstd * vitslim::to_float(p.weight[c]) +
                     vitslim::to_float(p.bias[c])) *
                    p.gate_at(row));
  }
  const double more = p.size.tolerance;
  require_close(exact(actual.mean), means, TOLERANCE<float>, "mean");
  require_close(exact(actual.rstd), rstds, TOLERANCE<float> + more, "rstd");
  require_close(exact(actual.out), out, TOLERANCE<E> + more, "out");
}

// From the statistics as forward rounded them.
template <typename E, typename W>
void check_backward(const Problem<E, W>& p, const Forward<E>& saved, const Backward<E>& actual) {
  const int64_t channels = p.size.channels;
  if (channels == 0) return;
  std::vector<double> grad_x, grad_gate, grad_affine(2 * channels), sums(2 * channels);
  for (int64_t row = 0; row < p.rows; ++row) {
    const auto n = [&](int64_t c) { return (p.x_at(row, c) - saved.mean[row]) * saved.rstd[row]; };
    double average = 0, slope = 0, gate = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const double grad = p.grad_at(row, c), weighted = grad * vitslim::to_float(p.weight[c]);
      average += weighted * p.gate_at(row) / double(channels);
      slope += weighted * n(c) * p.gate_at(row) / double(channels);
      gate += weighted * n(c) + grad * vitslim::to_float(p.bias[c]);
      grad_affine[c] += grad * p.gate_at(row) * n(c);
      grad_affine[channels + c] += grad * p.gate_at(row);
    }
    for (int64_t c = 0; c < channels; ++c) {
      const double weighted = p.grad_at(row, c) * vitslim::to_float(p.weight[c]) * p.gate_at(row);
      grad_x.push_back(saved.rstd[row] * (weighted - average - n(c) * slope));
    }
    if (p.size.gate) grad_gate.push_back(gate);
  }
  for (int64_t i = 0; i < actual.grad_affine.size(); ++i)
    sums[i % (2 * channels)] += actual.grad_affine[i];
  const double more = p.size.tolerance;
  require_close(exact(actual.grad_x), grad_x, TOLERANCE<E> + more, "grad_x");
  require_close(exact(actual.grad_gate), grad_gate, TOLERANCE<float> + more, "grad_gate",
                std::sqrt(double(channels)));
  require_close(sums, grad_affine, TOLERANCE<float> + more, "grad_affine");
}

template <typename E, typename W>
void check(const Size& size) {
  const Problem<E, W> problem(size, 7);
  const Forward<E> forward(problem);
  check_forward(problem, forward);
  check_backward(problem, forward, Backward<E>(problem, forward));
}

// Two runs give the same bits.
template <typename E, typename W>
void check_repeats(const Size& size) {
  const Problem<E, W> problem(size, 7);
  const Forward<E> forward(problem), again(problem);
  require(same_bits(forward.out, again.out) && same_bits(forward.rstd, again.rstd),
          "forward gives other bits in another run");
  const Backward<E> backward(problem, forward), once_more(problem, forward);
  require(same_bits(backward.grad_x, once_more.grad_x) &&
              same_bits(backward.grad_affine, once_more.grad_affine) &&
              same_bits(backward.grad_gate, once_more.grad_gate),
          "backward gives other bits in another run");
}

void check_dtypes(const Size& size) {
  check<float, float>(size);
  check<Half, Half>(size);
  check<Half, float>(size);
  check<BFloat16, BFloat16>(size);
  check<BFloat16, float>(size);
}

// Where only the walk over rows and columns is in question.
void check_two_dtypes(const Size& size) {
  check<float, float>(size);
  check<BFloat16, float>(size);
}

// NaN in one row changes no bit of the others.
template <typename E>
void check_nan(int64_t channels) {
  const Size size{2, 3, channels};
  Problem<E, float> problem(size, 11);
  const Forward<E> clean(problem);
  const Backward<E> clean_gradients(problem, clean);
  const int64_t broken = 4;
  problem.x[broken * channels + channels / 2] = vitslim::from_float<E>(NAN);
  const Forward<E> forward(problem);
  const Backward<E> backward(problem, forward);
  for (int64_t row = 0; row < problem.rows; ++row)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = row * channels + c;
      const float out = vitslim::to_float(forward.out[i]);
      const float grad = vitslim::to_float(backward.grad_x[i]);
      if (row == broken) {
        require(std::isnan(out) && std::isnan(grad) && std::isnan(backward.grad_gate[row]),
                "a row with NaN has another number");
      } else {
        require(out == vitslim::to_float(clean.out[i]) &&
                    grad == vitslim::to_float(clean_gradients.grad_x[i]) &&
                    backward.grad_gate[row] == clean_gradients.grad_gate[row],
                "NaN spoils another row");
      }
    }
}

// One multiprocessor: its blocks have more rows than they hold at a time.
void check_many_rows(const Size& size) {
  machine.processors = 1;
  check_two_dtypes(size);
  check_repeats<Half, Half>(size);
  machine.processors = Machine().processors;
}

}  // namespace

std::vector<Case> gated_layer_norm_cases() {
  std::vector<Case> cases;
  const auto add = [&](const std::string& name, const Size& size) {
    cases.push_back({name, [size] { check_dtypes(size); }});
  };
  const auto add_two_dtypes = [&](const std::string& name, const Size& size) {
    cases.push_back({name, [size] { check_two_dtypes(size); }});
  };
  for (const int64_t channels : {1, 33, 192})
    add("small gated_layer_norm, channels " + std::to_string(channels), {2, 2, channels});
  add_two_dtypes("small gated_layer_norm, nothing is aligned", {1, 3, 200, {1}});
  add_two_dtypes("small gated_layer_norm, several warps a row", {1, 2, 1040});
  add_two_dtypes("small gated_layer_norm, several warps a row and nothing is aligned",
                 {1, 1, 1032, {1}});
  for (const int64_t channels : {5, 8, 31, 64, 128, 200, 256, 384, 385, 512, 768, 1000, 1024, 1280,
                                 1536, 1544, 2048, 2049, 3072})
    add("gated_layer_norm, channels " + std::to_string(channels), {1, 3, channels});
  for (const int64_t channels : {3080, 4096, 4100, 6152, 8192})
    add_two_dtypes("gated_layer_norm, channels " + std::to_string(channels), {1, 3, channels});
  add("gated_layer_norm, channels 8200", {1, 2, 8200});
  add_two_dtypes("gated_layer_norm, channels 8201 and no gate", {2, 1, 8201, {1, 3}, false});
  add("gated_layer_norm, no gate", {2, 3, 384, {}, false});
  add("gated_layer_norm, aligned rows with padding", {2, 3, 384, {0, 8}});
  add("gated_layer_norm, rows that start anywhere", {2, 3, 384, {0, 3}});
  add("gated_layer_norm, nothing is aligned", {2, 3, 384, {1}});
  add_two_dtypes("gated_layer_norm, strides 0", {3, 2, 192, {0, 0, true}});
  add_two_dtypes("gated_layer_norm, strides 0 and nothing is aligned", {3, 2, 250, {1, 1, true}});
  add_two_dtypes("gated_layer_norm, strides 0 of long rows", {2, 2, 8200, {0, 0, true}});
  add_two_dtypes("small gated_layer_norm, no images", {0, 3, 64});
  add_two_dtypes("small gated_layer_norm, no tokens", {2, 0, 64});
  add_two_dtypes("small gated_layer_norm, no channels", {2, 3, 0});
  add("gated_layer_norm, a large eps", {1, 3, 384, {}, true, 0, 1, 3.0});
  for (const int64_t channels : {100, 1280, 8200}) {
    // The mean's own rounding, 3e-5, is 3e-4 of the spread; a variance from squares would be noise.
    const Size size{1, 3, channels, {}, true, 1e3, 0.1, 1e-6, 2e-3};
    cases.push_back({"gated_layer_norm, a large mean beside a small variance, channels " +
                         std::to_string(channels),
                     [size] { check<float, float>(size); }});
  }
  for (const int64_t channels : {40, 1100, 8200})
    cases.push_back({"gated_layer_norm, NaN, channels " + std::to_string(channels), [channels] {
                       check_nan<float>(channels);
                       check_nan<BFloat16>(channels);
                     }});
  for (const Size& size :
       {Size{2, 59, 192}, Size{2, 13, 768}, Size{1, 9, 1032}, Size{2, 13, 390}, Size{3, 7, 3080}})
    cases.push_back({"gated_layer_norm, many rows, channels " + std::to_string(size.channels),
                     [size] { check_many_rows(size); }});
  return cases;
}

}  // namespace emulated
