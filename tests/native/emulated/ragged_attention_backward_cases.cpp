// ragged_attention_backward_cuda: both of its kernels, against exact answers and against itself.

#include <cstdlib>
#include <cstring>

#include "attention_reference.h"
#include "cases.h"

namespace emulated {
namespace {

using namespace vitslim;

// Shared memory a block may have, as the device says it.
class MachineWith {
 public:
  explicit MachineWith(int shared_memory) { machine.shared_memory = shared_memory; }
  ~MachineWith() { machine = Machine(); }
};
constexpr int AMPLE = 166912, LITTLE = 101376;  // an A100's, an RTX 3090's

struct BackwardSetup {
  AttentionSetup attention;
  int float32_parts = 3;
  double mask_scale = 1;  // of the mask's numbers
  int shared_memory = AMPLE;
};

template <typename E>
struct BackwardResult {
  stress::Exact<E> grad_qkv;
  stress::Exact<float> grad_mask;  // [rows, D]
};

// What the forward kernel leaves for backward, which has to repeat its rounding.
template <typename E>
struct ForwardResult {
  stress::Exact<E> out;      // [batch, tokens, D]
  stress::Exact<float> lse;  // [batch, heads, tokens]
};

template <typename E>
ForwardResult<E> run_forward(const AttentionInputs<E>& inputs, const BackwardSetup& setup) {
  const int64_t rows = setup.attention.batch * setup.attention.tokens;
  const MachineWith machine(setup.shared_memory);
  ForwardResult<E> result{unwritten<E>(rows * inputs.columns(), setup.attention.shift),
                          unwritten<float>(rows * inputs.heads())};
  ragged_attention_forward_cuda({.shape = inputs.shape(),
                                 .qkv = inputs.qkv.data(),
                                 .mask = inputs.mask_or_null(),
                                 .out = result.out.data(),
                                 .lse = result.lse.data()},
                                Gpu{nullptr, setup.float32_parts});
  return result;
}

template <typename E>
BackwardResult<E> run_backward(const AttentionInputs<E>& inputs, const BackwardSetup& setup,
                               const stress::Exact<E>& out, const stress::Exact<float>& lse) {
  const int64_t batch = setup.attention.batch, tokens = setup.attention.tokens;
  const int64_t shift = setup.attention.shift;
  const Gpu gpu{nullptr, setup.float32_parts};
  const MachineWith machine(setup.shared_memory);
  const RaggedAttentionShape shape = inputs.shape();
  const int64_t rows = ragged_attention_grad_mask_rows_cuda(shape, gpu);
  BackwardResult<E> result{unwritten<E>(batch * tokens * 3 * inputs.columns(), shift),
                           unwritten<float>(setup.attention.masked ? rows * inputs.columns() : 0)};
  stress::Exact<float> delta = unwritten<float>(batch * inputs.heads() * tokens);
  ragged_attention_backward_cuda(
      {.shape = shape,
       .grad_out = inputs.grad_out.data(),
       .grad_out_batch_stride = inputs.grad_out_batch_stride,
       .grad_out_token_stride = inputs.grad_out_token_stride,
       .qkv = inputs.qkv.data(),
       .out = out.data(),
       .lse = lse.data(),
       .mask = inputs.mask_or_null(),
       .grad_qkv = result.grad_qkv.data(),
       .grad_mask = setup.attention.masked ? result.grad_mask.data() : nullptr,
       .delta = delta.data()},
      gpu);
  return result;
}

template <typename T>
void require_same(const stress::Exact<T>& a, const stress::Exact<T>& b, const char* name) {
  if (a.size() != b.size() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)))
    throw std::runtime_error(std::string("two runs differ in ") + name);
}

// Runs twice, for the same bits, and compares with the exact answer.
template <typename E>
void check_inputs(const BackwardSetup& setup, const AttentionInputs<E>& inputs) {
  const AttentionAnswer expected = attention_answer<double>(inputs);
  const AttentionAnswer eager = attention_answer<float>(inputs);
  const auto [out, lse] = run_forward(inputs, setup);
  const BackwardResult<E> actual = run_backward(inputs, setup, out, lse);
  const BackwardResult<E> again = run_backward(inputs, setup, out, lse);
  require_same(actual.grad_qkv, again.grad_qkv, "grad_qkv");
  require_same(actual.grad_mask, again.grad_mask, "grad_mask");
  const auto close = [&](const std::vector<double>& a, const std::vector<double>& e,
                         const std::vector<double>& by_eager, const char* name) {
    double size = 1e-2;
    for (const double each : e) size = std::max(size, std::abs(each));
    // Two parts keep 16 of 24 bits. Arithmetic in 16 bits errs by half of TOLERANCE to all of it
    // itself, and `by_eager` is of float32.
    const double own = sizeof(E) == 2                               ? 2 * TOLERANCE<E>
                       : sizeof(E) == 4 && setup.float32_parts == 2 ? 1e-4
                                                                    : TOLERANCE<E>;
    return require_close(a, e, own + 2 * largest_difference(by_eager, e) / size, name);
  };
  const double part = close(exact(actual.grad_qkv), expected.grad_qkv, eager.grad_qkv, "grad_qkv");
  double mask = 0;
  if (setup.attention.masked) {
    std::vector<double> sums(inputs.columns());
    for (int64_t i = 0; i < actual.grad_mask.size(); ++i)
      sums[i % inputs.columns()] += actual.grad_mask[i];
    mask = close(sums, expected.grad_mask, eager.grad_mask, "grad_mask");
  }
  if (std::getenv("VITSLIM_SHOW_ERRORS"))
    std::printf("  grad_qkv %.3f, grad_mask %.3f of what is allowed\n", part, mask);
}

template <typename E>
void check(const BackwardSetup& setup) {
  AttentionInputs<E> inputs(setup.attention);
  for (float& each : inputs.mask) each *= float(setup.mask_scale);
  check_inputs(setup, inputs);
}

// Every dtype, and float32 in 2 parts too.
void check_float32(BackwardSetup setup) {
  check<float>(setup);
  setup.float32_parts = 2;
  check<float>(setup);
}
void check_all(const BackwardSetup& setup) {
  check<Half>(setup);
  check<BFloat16>(setup);
  check_float32(setup);
}

void empty() {
  for (const auto& [batch, tokens] : {std::pair<int64_t, int64_t>{0, 5}, {2, 0}, {0, 0}}) {
    BackwardSetup setup{{.batch = batch, .tokens = tokens, .widths = {8, 0, 3}, .masked = true}};
    const AttentionInputs<Half> inputs(setup.attention);
    if (ragged_attention_grad_mask_rows_cuda(inputs.shape(), Gpu{nullptr, 3}) != 0)
      throw std::runtime_error("rows of grad_mask without tokens");
    const int64_t launches = emulated::launches;
    run_backward(inputs, setup, stress::Exact<Half>(), stress::Exact<float>());
    if (emulated::launches != launches) throw std::runtime_error("a launch without tokens");
  }
  for (const std::vector<int64_t>& widths : {std::vector<int64_t>{}, {0}, {0, 0}})
    check_all({{.batch = 2, .tokens = 5, .widths = widths, .masked = true}});
}

void too_wide() {
  try {
    const BackwardSetup setup{{.tokens = 3, .widths = {8, 129}}};
    run_backward(AttentionInputs<Half>(setup.attention), setup, unwritten<Half>(3 * 137),
                 unwritten<float>(3 * 2));
  } catch (const std::runtime_error& error) {
    if (std::strstr(error.what(), "129 wide")) return;
    throw;
  }
  throw std::runtime_error("a head of 129 was accepted");
}

// Which kernel a shape gets, by the rows of grad_mask.
void choice() {
  const auto rows = [](int64_t tokens, int64_t width, DType dtype, int shared_memory) {
    const MachineWith machine(shared_memory);
    const int64_t offsets[] = {0, 8, 8 + width};
    return ragged_attention_grad_mask_rows_cuda({.batch = 3,
                                                 .tokens = tokens,
                                                 .heads = 2,
                                                 .head_offsets = offsets,
                                                 .scale = 1,
                                                 .dtype = dtype,
                                                 .qkv_batch_stride = 0,
                                                 .qkv_token_stride = 0},
                                                Gpu{nullptr, 3});
  };
  const DType half = DType::FLOAT16;
  if (rows(197, 64, half, AMPLE) != 3 || rows(197, 64, half, LITTLE) != 3 ||
      rows(256, 64, half, AMPLE) != 3 || rows(256, 64, half, LITTLE) != 12 ||
      rows(256, 48, half, LITTLE) != 3 || rows(257, 8, half, AMPLE) != 15 ||
      rows(17, 65, half, AMPLE) != 3 || rows(65, 65, half, AMPLE) != 6 ||
      rows(65, 8, DType::FLOAT32, AMPLE) != 6)
    throw std::runtime_error("not the kernel that a shape should get");
}

// Scores so low that the exponential of what is not there would be infinite. What is added up for
// grad_mask cancels to nothing, and so counts only as a number.
template <typename E>
void check_low_scores(bool masked) {
  const BackwardSetup setup{
      {.tokens = 21, .widths = {16}, .masked = masked, .scale = -2, .spread = 0.1}};
  AttentionInputs<E> inputs(setup.attention);
  for (int64_t i = 0; i < inputs.qkv.size(); ++i)
    if (i % 48 < 32) inputs.qkv[i] = from_float<E>(to_float(inputs.qkv[i]) + 3.0f);
  for (float& each : inputs.mask) each = 1;
  if (!masked) return check_inputs(setup, inputs);
  const auto [out, lse] = run_forward(inputs, setup);
  const BackwardResult<E> result = run_backward(inputs, setup, out, lse);
  for (const float each : result.grad_mask)
    if (!(std::abs(each) < 1)) throw std::runtime_error("grad_mask of low scores");
}
void low_scores() {
  for (const bool masked : {false, true}) {
    check_low_scores<Half>(masked);
    check_low_scores<float>(masked);
  }
}

// NaN in one head of one image reaches no other.
template <typename E>
void check_nan() {
  const BackwardSetup setup{{.batch = 2, .tokens = 18, .widths = {8, 7}, .masked = true}};
  const AttentionInputs<E> clean(setup.attention);
  AttentionInputs<E> poisoned(setup.attention);
  const AttentionAnswer expected = attention_answer<double>(clean);
  const stress::Exact<E> out = rounded<E>(expected.out);
  stress::Exact<float> lse = rounded<float>(expected.lse);
  const BackwardResult<E> before = run_backward(clean, setup, out, lse);
  poisoned.qkv[5 * 45 + 15 + 2] = from_float<E>(NAN);
  for (int64_t i = 0; i < 18; ++i) lse[i] = NAN;
  const BackwardResult<E> after = run_backward(poisoned, setup, out, lse);
  for (int64_t i = 0; i < after.grad_qkv.size(); ++i) {
    const bool affected = i < 18 * 45 && i % 15 < 8;
    const float was = to_float(before.grad_qkv[i]), is = to_float(after.grad_qkv[i]);
    if (affected != std::isnan(is) || (!affected && was != is))
      throw std::runtime_error("NaN is not where it belongs in grad_qkv");
  }
  for (int64_t i = 0; i < after.grad_mask.size(); ++i)
    if (std::isnan(after.grad_mask[i]) != (i < 8))
      throw std::runtime_error("NaN is not where it belongs in grad_mask");
}
void not_a_number() {
  check_nan<Half>();
  check_nan<float>();
}

}  // namespace

std::vector<Case> ragged_attention_backward_cases() {
  std::vector<Case> cases;
  const auto add = [&](const std::string& name, const BackwardSetup& setup, auto run) {
    cases.push_back({name, [=] { run(setup); }});
  };
  const auto half = [](const BackwardSetup& setup) { check<Half>(setup); };
  const auto bfloat16 = [](const BackwardSetup& setup) { check<BFloat16>(setup); };

  cases.push_back({"small attention backward, nothing to do", empty});
  cases.push_back({"small attention backward, too wide", too_wide});
  cases.push_back({"small attention backward, choice", choice});
  add("small attention backward, one token",
      {{.batch = 2, .tokens = 1, .widths = {7, 16}, .masked = true}}, check_all);
  add("small attention backward, 17 tokens",
      {{.tokens = 17, .widths = {16, 0, 1, 24}, .masked = true}}, check_all);
  add("small attention backward, without a mask", {{.tokens = 17, .widths = {8, 33}}}, half);
  add("small attention backward, streaming",
      {{.tokens = 18, .widths = {7, 66}, .masked = true, .scale = 0.12}}, bfloat16);
  add("small attention backward, odd offsets and strides",
      {{.batch = 2,
        .tokens = 18,
        .widths = {1, 7, 9},
        .masked = true,
        .shift = 1,
        .token_gap = 3,
        .batch_gap = 5}},
      check_all);
  add("attention backward, one image for all",
      {{.batch = 2,
        .tokens = 19,
        .widths = {8, 16},
        .masked = true,
        .scale = 0.125,
        .one_image = true}},
      check_all);
  add("attention backward, small mask",
      {.attention = {.tokens = 20, .widths = {16, 7}, .masked = true}, .mask_scale = 1e-3},
      check_all);
  cases.push_back({"attention backward, low scores", low_scores});
  cases.push_back({"attention backward, NaN", not_a_number});
  add("attention backward, 130 heads",
      {{.tokens = 2, .widths = std::vector<int64_t>(130, 1), .masked = true}}, half);
  add("attention backward, 50 tokens", {{.tokens = 50, .widths = {48, 33}, .masked = true}}, half);
  add("attention backward, 50 tokens, streaming",
      {{.tokens = 50, .widths = {16, 48, 72}, .masked = true}}, half);
  add("attention backward, 50 tokens, float32",
      {{.tokens = 50, .widths = {100, 24}, .masked = true, .scale = 0.1}}, check_float32);
  add("attention backward, two blocks of keys", {{.tokens = 81, .widths = {7, 48}, .masked = true}},
      [](const BackwardSetup& setup) { check<float>(setup); });
  add("attention backward, 128 wide", {{.tokens = 33, .widths = {128, 112}, .masked = true}},
      bfloat16);
  add("attention backward, 65 tokens", {{.tokens = 65, .widths = {64}, .masked = true}}, bfloat16);
  add("attention backward, 197 tokens", {{.tokens = 197, .widths = {64}, .masked = true}}, half);
  add("attention backward, 256 tokens", {{.tokens = 256, .widths = {16}}}, bfloat16);
  add("attention backward, 257 tokens", {{.tokens = 257, .widths = {8}, .masked = true}}, half);
  return cases;
}

}  // namespace emulated
