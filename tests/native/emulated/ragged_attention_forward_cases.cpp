// Cases of ragged_attention's forward: every way through the kernel, and what must not pass from
// one head, image or call into another.

#include "../../../csrc/cuda/ragged_attention_forward.cuh"
#include "attention_reference.h"
#include "cases.h"

namespace emulated {
namespace {

using vitslim::BFloat16;
using vitslim::Half;

// A machine of one case alone.
class OnMachine {
 public:
  explicit OnMachine(const Machine& wanted) : before_(machine) { machine = wanted; }
  ~OnMachine() { machine = before_; }

 private:
  Machine before_;
};

// So few that heads are not split.
const Machine ONE_PROCESSOR{.processors = 1};
const Machine SMALL_MEMORY{.shared_memory = 48 * 1024};
const Machine MANY_PROCESSORS{.processors = 108};

template <typename E>
struct Result {
  stress::Exact<E> out;
  stress::Exact<float> lse;
  int64_t launches;
};

template <typename E>
Result<E> run(const AttentionInputs<E>& inputs, int parts = 3, bool with_lse = true) {
  const AttentionSetup& setup = inputs.setup;
  Result<E> result{
      unwritten<E>(setup.batch * setup.tokens * inputs.columns(), setup.shift),
      unwritten<float>(with_lse ? setup.batch * inputs.heads() * setup.tokens : 0, setup.shift),
      -launches};
  vitslim::ragged_attention_forward_cuda({.shape = inputs.shape(),
                                          .qkv = inputs.qkv.data(),
                                          .mask = inputs.mask_or_null(),
                                          .out = result.out.data(),
                                          .lse = with_lse ? result.lse.data() : nullptr},
                                         {.stream = nullptr, .float32_parts = parts});
  result.launches += launches;
  return result;
}

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

// Numbers as they are: NaN where NaN, infinity where infinity.
void require_same(double actual, double expected, double allowed, const std::string& name) {
  if (std::isnan(expected) ? std::isnan(actual)
                           : actual == expected || std::abs(actual - expected) <= allowed)
    return;
  std::ostringstream sentence;
  sentence << name << " is " << actual << ", expected " << expected << " within " << allowed;
  throw std::runtime_error(sentence.str());
}

double largest(const std::vector<double>& numbers) {
  double size = 0;
  for (const double each : numbers)
    if (std::isfinite(each)) size = std::max(size, std::abs(each));
  return size;
}

// The project's budget: twice what eager's float32 errs, and a fraction of the largest number. Two
// parts keep 16 bits of a float32, as 2^-16 of a score and of a value.
template <typename E>
double allowed(const std::vector<double>& exact, const std::vector<double>& eager, int parts) {
  const double fraction = sizeof(E) == 2 ? TOLERANCE<E> : parts == 2 ? 1e-4 : 2e-6;
  return 2 * largest_difference(exact, eager) + fraction * std::max(largest(exact), 1e-2);
}

template <typename E>
void check(const AttentionSetup& setup, int parts = 3, const Machine& on = {}) {
  const OnMachine scope(on);
  const AttentionInputs<E> inputs(setup);
  const Result<E> result = run(inputs, parts);
  const AttentionAnswer expected = attention_answer<double>(inputs);
  const AttentionAnswer eager = attention_answer<float>(inputs);
  const std::vector<double> out = exact(result.out), lse = exact(result.lse);
  const double out_allowed = allowed<E>(expected.out, eager.out, parts);
  for (size_t i = 0; i < out.size(); ++i)
    require_same(out[i], expected.out[i], out_allowed, "out[" + std::to_string(i) + "]");
  // Without a mask, 16-bit q and k are multiplied exactly.
  const double lse_allowed = setup.masked || sizeof(E) == 4
                                 ? allowed<E>(expected.lse, eager.lse, parts)
                                 : allowed<float>(expected.lse, eager.lse, 3);
  for (size_t i = 0; i < lse.size(); ++i)
    require_same(lse[i], expected.lse[i], lse_allowed, "lse[" + std::to_string(i) + "]");
  require(result.launches == (setup.batch * setup.tokens > 0),
          "launches: " + std::to_string(result.launches));
}

void shapes(std::vector<Case>& cases) {
  const std::vector<int64_t> narrow{0, 1, 7, 16, 24}, wide{33, 48, 64}, widest{100, 128, 8};
  for (const int64_t tokens : {1, 17, 50})
    for (const bool masked : {false, true}) {
      const std::string name =
          "small forward, N " + std::to_string(tokens) + (masked ? ", masked, " : ", ");
      const AttentionSetup setup{.batch = 2, .tokens = tokens, .widths = narrow, .masked = masked};
      cases.push_back({name + "float32 in 3", [=] { check<float>(setup, 3); }});
      cases.push_back({name + "float32 in 2", [=] { check<float>(setup, 2); }});
      cases.push_back({name + "float16", [=] { check<Half>(setup); }});
      cases.push_back({name + "bfloat16", [=] { check<BFloat16>(setup); }});
    }
  for (const bool masked : {false, true}) {
    const std::string name = masked ? "forward, masked, " : "forward, ";
    const AttentionSetup to_64{.tokens = 50, .widths = wide, .masked = masked};
    const AttentionSetup to_128{.tokens = 33, .widths = widest, .masked = masked};
    cases.push_back({name + "64 wide, float32 in 3", [=] { check<float>(to_64, 3); }});
    cases.push_back({name + "64 wide, float32 in 2", [=] { check<float>(to_64, 2); }});
    cases.push_back({name + "64 wide, float16", [=] { check<Half>(to_64); }});
    cases.push_back({name + "64 wide, bfloat16", [=] { check<BFloat16>(to_64); }});
    cases.push_back({name + "128 wide, float32 in 3", [=] { check<float>(to_128, 3); }});
    cases.push_back({name + "128 wide, float32 in 2", [=] { check<float>(to_128, 2); }});
    cases.push_back({name + "128 wide, float16", [=] { check<Half>(to_128); }});
    cases.push_back({name + "128 wide, bfloat16", [=] { check<BFloat16>(to_128); }});
  }
}

// Each way to walk the keys, of all that the host chooses from.
void ways(std::vector<Case>& cases) {
  const AttentionSetup vit{.tokens = 197, .widths = {24, 64}, .masked = true};
  cases.push_back(
      {"forward, N 197, resident, two rounds", [=] { check<BFloat16>(vit, 3, ONE_PROCESSOR); }});
  // The least shared memory that kernels have to do with, 99 KiB of sm_86.
  cases.push_back({"forward, 128 wide, float32 in 99 KiB",
                   [] { check<float>({.tokens = 81, .widths = {128}}, 3, {1, 99 * 1024}); }});
  cases.push_back({"forward, 64 wide, float32 in 99 KiB",
                   [] { check<float>({.tokens = 139, .widths = {64}}, 3, {1, 99 * 1024}); }});
  cases.push_back({"small forward, two rounds",
                   [] { check<Half>({.tokens = 140, .widths = {8}}, 3, ONE_PROCESSOR); }});
  cases.push_back(
      {"forward, N 150, float32, two rounds",
       [] { check<float>({.tokens = 150, .widths = {24}, .masked = true}, 3, ONE_PROCESSOR); }});
  cases.push_back({"forward, N 197, streamed", [=] { check<BFloat16>(vit, 3, SMALL_MEMORY); }});
  cases.push_back({"forward, N 197, split", [=] { check<BFloat16>(vit, 3, MANY_PROCESSORS); }});
  cases.push_back(
      {"forward, N 197, float32", [=] { check<float>({.tokens = 197, .widths = {32}}); }});
  cases.push_back({"forward, N 257, streamed in rounds of blocks",
                   [=] { check<Half>({.tokens = 257, .widths = {40}}); }});
  // 15 keys in the last tile, 16, 49 and none: 16 at a time, or padded to 64.
  for (const int64_t tokens : {79, 80, 113, 128}) {
    const AttentionSetup setup{.tokens = tokens, .widths = {16, 5}};
    const std::string name = "forward, N " + std::to_string(tokens);
    cases.push_back({name + ", resident", [=] { check<Half>(setup); }});
    cases.push_back({name + ", split", [=] { check<Half>(setup, 3, MANY_PROCESSORS); }});
  }
  // A ring of two tiles that is walked more than once.
  const AttentionSetup streamed{.batch = 2, .tokens = 165, .widths = {9, 16}};
  cases.push_back({"small forward, streamed, bfloat16",
                   [=] { check<BFloat16>({.tokens = 165, .widths = {16}}, 3, {2, 12 * 1024}); }});
  cases.push_back(
      {"forward, streamed, float16", [=] { check<Half>(streamed, 3, {2, 12 * 1024}); }});
  cases.push_back(
      {"forward, streamed, float32", [=] { check<float>(streamed, 3, {2, 36 * 1024}); }});
}

void layouts(std::vector<Case>& cases) {
  AttentionSetup setup{.batch = 3, .tokens = 18, .widths = {8, 16, 8}};
  setup.one_image = true;
  cases.push_back({"small forward, batch stride 0", [=] { check<Half>(setup); }});
  setup.one_image = false;
  setup.token_gap = 8, setup.batch_gap = 16;
  cases.push_back({"small forward, wide strides", [=] { check<Half>(setup); }});
  setup.token_gap = 3, setup.batch_gap = 5;
  cases.push_back({"small forward, odd strides, float16", [=] { check<Half>(setup); }});
  cases.push_back({"small forward, odd strides, float32", [=] { check<float>(setup); }});
  setup.shift = 1;
  setup.token_gap = setup.batch_gap = 0;
  cases.push_back({"small forward, odd pointers, bfloat16", [=] { check<BFloat16>(setup); }});
  cases.push_back({"small forward, odd pointers, float32", [=] { check<float>(setup); }});
  setup.shift = 0;
  setup.widths = {3, 8, 5, 8};
  cases.push_back({"small forward, odd offsets", [=] { check<Half>(setup); }});
  cases.push_back({"small forward, only width 0",
                   [] { check<Half>({.batch = 2, .tokens = 5, .widths = {0, 0}}); }});
  cases.push_back({"small forward, nothing", [] {
                     check<Half>({.batch = 0, .tokens = 5, .widths = {8}});
                     check<Half>({.batch = 2, .tokens = 0, .widths = {8}});
                   }});
  cases.push_back({"small forward, no lse", [] {
                     const AttentionInputs<Half> inputs({.tokens = 17, .widths = {8}});
                     const Result<Half> with = run(inputs), without = run(inputs, 3, false);
                     require(exact(with.out) == exact(without.out), "out depends on lse");
                   }});
}

void scores(std::vector<Case>& cases) {
  AttentionSetup setup{.tokens = 70, .widths = {8, 16}, .masked = true, .scale = -0.3f};
  cases.push_back({"small forward, negative scale, float32", [=] { check<float>(setup); }});
  cases.push_back({"small forward, negative scale, float16", [=] { check<Half>(setup); }});
  setup.scale = 0;
  cases.push_back({"small forward, scale 0, float32", [=] { check<float>(setup); }});
  cases.push_back({"small forward, scale 0, float16", [=] { check<Half>(setup); }});
  setup.masked = false;
  setup.scale = 1;
  setup.spread = 30;
  cases.push_back({"small forward, large scores, float32", [=] { check<float>(setup); }});
  cases.push_back({"small forward, large scores, bfloat16", [=] { check<BFloat16>(setup); }});
  // Rows of which all scores are -inf, the first 64 are, or one is +inf, by keys of infinity.
  cases.push_back(
      {"small forward, infinite scores", [] {
         for (const auto& [from, to, sign] : {std::tuple{0, 70, 1}, std::tuple{0, 64, 1},
                                              std::tuple{3, 4, -1}, std::tuple{69, 70, -1}}) {
           AttentionInputs<Half> inputs({.tokens = 70, .widths = {1}, .scale = 1});
           for (int i = 0; i < 70; ++i) {
             inputs.qkv[i * 3] = vitslim::from_float<Half>(-1);
             if (i >= from && i < to)
               inputs.qkv[i * 3 + 1] = vitslim::from_float<Half>(INFINITY * float(sign));
           }
           const Result<Half> result = run(inputs);
           const AttentionAnswer expected = attention_answer<double>(inputs);
           for (int i = 0; i < 70; ++i) {
             require_same(vitslim::to_float(result.out[i]), expected.out[i], 3e-3, "out");
             require_same(result.lse[i], expected.lse[i], 1e-5, "lse");
           }
         }
       }});
}

// A NaN in part 0, 1 or 2 (q, k, v) of head 1 in image 1 changes what it must and no other bit.
void contagion(std::vector<Case>& cases) {
  cases.push_back(
      {"small forward, NaN stays", [] {
         const AttentionInputs<Half> clean({.batch = 3, .tokens = 18, .widths = {8, 8, 8}});
         const Result<Half> before = run(clean);
         for (const int part : {0, 1, 2}) {
           AttentionInputs<Half> inputs = clean;
           const int64_t query = 17, head = 1, column = 3;
           inputs.qkv[(18 + query) * 72 + part * 24 + head * 8 + column] =
               vitslim::from_float<Half>(NAN);
           const Result<Half> after = run(inputs);
           for (int64_t i = 0; i < after.out.size(); ++i) {
             const int64_t token = i / 24 % 18, of_head = i % 24 / 8;
             const bool reached = i / 24 / 18 == 1 && of_head == head &&
                                  (part == 0   ? token == query
                                   : part == 1 ? true
                                               : i % 8 == column);
             const float a = vitslim::to_float(after.out[i]), b = vitslim::to_float(before.out[i]);
             require(reached ? std::isnan(a) : a == b, "a NaN went astray in out");
           }
           for (int64_t i = 0; i < after.lse.size(); ++i) {
             const bool reached =
                 i / 18 == 3 + head && (part == 1 || (part == 0 && i % 18 == query));
             require(reached ? std::isnan(after.lse[i]) : after.lse[i] == before.lse[i],
                     "a NaN went astray in lse");
           }
         }
       }});
}

void works_kernel(vitslim::BlockWork* works, vitslim::ForwardTask<float> task,
                  vitslim::HeadTable table) {
  if (threadIdx.x == 0) works[blockIdx.x] = vitslim::block_work(task, table);
}

// Every stripe of every head and image belongs to exactly one block, and heads come in the table's
// order within the images that are walked together.
void check_works(int batch, int images, int stripes, int group) {
  vitslim::HeadTable table{.count = 3, .columns = 6, .heads = {{1, 0, 3}, {0, 0, 2}, {2, 0, 1}}};
  const int groups = (stripes + group - 1) / group;
  vitslim::ForwardTask<float> task{};
  task.batch = batch, task.tokens = stripes * 16 - 3;
  task.plan.images = images, task.plan.groups = groups, task.plan.group = group;
  std::vector<vitslim::BlockWork> works(batch * 3 * groups);
  launch(works_kernel, unsigned(works.size()), 32, 0, works.data(), task, table);
  std::vector<int> taken(batch * 3 * stripes);
  for (size_t i = 0; i < works.size(); ++i) {
    const vitslim::BlockWork& work = works[i];
    for (int s = work.first_stripe; s < work.end_stripe; ++s)
      ++taken.at((work.image * 3 + work.head.index) * stripes + s);
    if (i == 0) continue;
    const vitslim::BlockWork& before = works[i - 1];
    const int set = work.image / images, set_before = before.image / images;
    require(set > set_before || (set == set_before && work.head.width <= before.head.width),
            "blocks are out of order");
  }
  require(std::all_of(taken.begin(), taken.end(), [](int each) { return each == 1; }),
          "a stripe is left out or done twice");
}

void launched(std::vector<Case>& cases) {
  cases.push_back({"small forward, the work of all blocks", [] {
                     check_works(5, 2, 5, 2);
                     check_works(4, 2, 1, 1);
                     check_works(1, 1, 13, 13);
                     check_works(3, 3, 13, 3);
                   }});
  cases.push_back({"forward, 130 heads take two launches", [] {
                     AttentionSetup setup{.tokens = 3};
                     for (int h = 0; h < 130; ++h) setup.widths.push_back(1 + h % 3);
                     const AttentionInputs<Half> inputs(setup);
                     const Result<Half> result = run(inputs);
                     const AttentionAnswer expected = attention_answer<double>(inputs);
                     require_close(exact(result.out), expected.out, TOLERANCE<Half>, "out");
                     require_close(exact(result.lse), expected.lse, 1e-5, "lse");
                     require(result.launches == 2, "launches");
                   }});
  cases.push_back({"small forward, the same bits again", [] {
                     const AttentionInputs<float> inputs({.tokens = 40, .widths = {8, 16}});
                     const Result<float> first = run(inputs), second = run(inputs);
                     require(exact(first.out) == exact(second.out), "out");
                     require(exact(first.lse) == exact(second.lse), "lse");
                   }});
  cases.push_back({"small forward, what cannot run", [] {
                     const auto sentence = [](const AttentionInputs<Half>& inputs) {
                       try {
                         run(inputs);
                       } catch (const std::runtime_error& error) {
                         return std::string(error.what());
                       }
                       return std::string();
                     };
                     require(sentence(AttentionInputs<Half>({.tokens = 2, .widths = {8, 129}}))
                                     .find("head 1 is 129 wide") != std::string::npos,
                             "a wide head");
                     const OnMachine scope({.shared_memory = 1024});
                     require(sentence(AttentionInputs<Half>({.tokens = 2, .widths = {8}}))
                                     .find("ragged_attention_forward_kernel failed to start") !=
                                 std::string::npos,
                             "a small machine");
                   }});
}

}  // namespace

std::vector<Case> ragged_attention_forward_cases() {
  std::vector<Case> cases;
  shapes(cases);
  ways(cases);
  layouts(cases);
  scores(cases);
  contagion(cases);
  launched(cases);
  return cases;
}

}  // namespace emulated
