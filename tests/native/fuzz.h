// Random cases against the reference, in every instruction set and with several numbers of threads.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cpu/isa.h"
#include "exact.h"
#include "expected.h"
#include "packing.h"
#include "pool.h"

namespace stress {

// What no kernel computes: an element that was not written keeps it.
constexpr float UNWRITTEN = -7.654321e30f;

// What is wrong with the numbers that go in.
enum class Trouble { NONE, LARGE, HUGE_NUMBERS, DENORMAL, NOT_FINITE };

inline Trouble random_trouble(Random& random) {
  if (random.chance(0.6)) return Trouble::NONE;
  return random.pick(
      {Trouble::LARGE, Trouble::HUGE_NUMBERS, Trouble::DENORMAL, Trouble::NOT_FINITE});
}

// Of the numbers of an input; one that is not finite comes in addition.
inline double deviation_of(Trouble trouble) {
  if (trouble == Trouble::LARGE) return 1e4;
  if (trouble == Trouble::HUGE_NUMBERS) return 1e15;
  return trouble == Trouble::DENORMAL ? 1e-41 : 1;
}

inline float random_not_finite(Random& random) { return random.pick({NAN, INFINITY, -INFINITY}); }

// The threads that a case runs with, made once.
struct Pools {
  std::vector<std::unique_ptr<Pool>> all;
  Pools() {
    for (const int64_t count : {1, 2, 3, 5}) all.push_back(std::make_unique<Pool>(count));
    all.push_back(std::make_unique<Pool>(4, Cut::ANY));
    // The first once more: scratch memory now holds what the others left there.
    all.push_back(std::make_unique<Pool>(1));
  }
};

// Runs compute(out, threads) in every way; all results of an instruction set must be the same bits.
// Returns the largest part of the budget that judge(out) finds used. `keep`, if given, gets each
// instruction set's result.
template <typename Compute, typename Judge>
double run_every_way(const std::vector<vitslim::Isa>& isas, Pools& pools, int64_t elements,
                     const Compute& compute, const Judge& judge,
                     std::vector<Exact<float>>* keep = nullptr) {
  double worst = 0;
  for (const vitslim::Isa isa : isas) {
    vitslim::set_current_isa(isa);
    Exact<float> first;
    for (size_t i = 0; i < pools.all.size(); ++i) {
      Exact<float> out(elements, i % 2, UNWRITTEN);
      const vitslim::Threads threads = pools.all[i]->threads();
      const std::string way = std::string(" (") + vitslim::isa_name(isa) + ", " +
                              std::to_string(threads.count) + " threads, way " + std::to_string(i) +
                              ")";
      try {
        compute(out.data(), threads);
        if (i == 0) {
          worst = std::max(worst, judge(out.data()));
          first = out;
        }
      } catch (const std::exception& error) {
        throw std::runtime_error(error.what() + way);
      }
      require(same_bits(first.data(), out.data(), elements), "not the bits of one thread" + way);
    }
    if (keep) keep->push_back(first);
  }
  return worst;
}

// One random model and batch. Returns the largest part of the budget that was used.
inline double fuzz_encoder(uint64_t seed, const std::vector<vitslim::Isa>& isas, Pools& pools,
                           std::string& what) {
  Random random(seed);
  Limits limits;
  if (random.chance(0.02)) limits = {420, 4, 70, 900, 200, 1};
  Model model = random_model(random, limits);
  const int64_t batch = limits.blocks == 1 ? 1 : random.between(0, 5);
  const Trouble trouble = random_trouble(random);
  what = "encoder: batch " + std::to_string(batch) + ", trouble " + std::to_string(int(trouble)) +
         ", " + describe(model);

  const int64_t size = model.image_elements(), result = model.rows * model.embed_dim;
  Exact<float> images(batch * size, random.between(0, 1));
  for (float& pixel : images) pixel = float(deviation_of(trouble) * random.normal());
  // Numbers that are not finite come into one image, or by the model into all.
  const int64_t sick =
      batch > 0 && trouble == Trouble::NOT_FINITE ? random.between(0, batch - 1) : -1;
  std::vector<Exact<float>> healthy;
  if (sick >= 0 && random.chance(0.2)) {
    model.start[random.between(0, int64_t(model.start.size()) - 1)] = random_not_finite(random);
  } else if (sick >= 0) {
    const PackedModel packed = pack(model);
    run_every_way(
        isas, pools, batch * result,
        [&](float* out, const vitslim::Threads& threads) {
          encode(packed, images.data(), batch, out, threads);
        },
        [](const float*) { return 0.0; }, &healthy);
    images[sick * size + random.between(0, size - 1)] = random_not_finite(random);
  }

  std::vector<Expected> expected;
  for (int64_t i = 0; i < batch; ++i)
    expected.push_back(expect(
        model.bfloat16_products, model.bfloat16_products ? BFLOAT16_NOISE : FLOAT32_NOISE, seed,
        [&](Reference& reference) { return reference.encode(model, images.data() + i * size); }));
  const PackedModel packed = pack(model, random.between(0, 1));
  std::vector<Exact<float>> outs;
  const double worst = run_every_way(
      isas, pools, batch * result,
      [&](float* out, const vitslim::Threads& threads) {
        encode(packed, images.data(), batch, out, threads);
      },
      [&](const float* out) {
        double part = 0;
        for (int64_t i = 0; i < batch; ++i)
          part = std::max(part, error_of(out + i * result, expected[i]));
        return part;
      },
      &outs);
  for (size_t isa = 0; isa < healthy.size(); ++isa)
    for (int64_t i = 0; i < batch; ++i)
      require(i == sick || same_bits(healthy[isa].data() + i * result,
                                     outs[isa].data() + i * result, result),
              "a number that is not finite in one image changed another");
  return worst;
}

}  // namespace stress
