// Models whose arrays do not fit each other: one sentence, never a crash nor a read outside.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fuzz.h"

namespace stress {

struct BrokenCount {
  int64_t refused = 0, computed = 0;
};

inline int64_t random_number(Random& random, int64_t old) {
  switch (random.between(0, 4)) {
    case 0:
      return int64_t(uint64_t(old) + uint64_t(random.pick<int64_t>({-1, 1, -16, 16})));
    case 1:
      return random.pick({-1, 0, 1, 2, 5});
    case 2:
      return random.pick({INT64_MAX, INT64_MIN, INT64_MAX / 3, INT64_MAX / 16 + 1});
    case 3:
      return (int64_t(1) << random.between(8, 62)) + random.between(-1, 1);
    default:
      return int64_t(random.next());
  }
}

// Another length than the right one, mostly a near one.
inline int64_t random_length(Random& random, int64_t length) {
  const int64_t other =
      random.chance(0.5) ? length + random.pick({-16, -1, 1, 16}) : random.between(0, 2 * length);
  return other == length || other < 0 ? length + 1 : other;
}

inline void break_panels(Random& random, Panels& panels) {
  const bool floats = panels.dtype == vitslim::DType::FLOAT32;
  if (random.chance(0.7)) {
    const int64_t length = random_length(random, panels.size());
    if (floats)
      panels.floats = panels.floats.resized(length);
    else
      panels.halves = panels.halves.resized(length);
    return;
  }
  // The same number of elements of the other type.
  panels.dtype = floats ? vitslim::DType::BFLOAT16 : vitslim::DType::FLOAT32;
  if (floats)
    panels.halves = Exact<uint16_t>(panels.floats.size(), 0, 0x3f80);
  else
    panels.floats = Exact<float>(panels.halves.size(), 0, 1.0f);
}

// One thing that no kernel may accept; returns what it was.
inline std::string break_surely(Random& random, PackedModel& packed) {
  switch (random.between(0, 6)) {
    case 0:
      packed.layout = packed.layout.resized(random_length(random, packed.layout.size()));
      return "layout's length";
    case 1:
      packed.vectors = packed.vectors.resized(random_length(random, packed.vectors.size()));
      return "the vectors' length";
    case 2: {
      const int64_t length = random_length(random, packed.panels.size());
      packed.panels.floats =
          packed.panels.floats.resized(packed.panels.dtype == vitslim::DType::FLOAT32 ? length : 0);
      packed.panels.halves = packed.panels.halves.resized(
          packed.panels.dtype == vitslim::DType::BFLOAT16 ? length : 0);
      return "the panels' length";
    }
    case 3: {
      const int64_t old = packed.layout[0];
      do packed.layout[0] = random_number(random, old);
      while (packed.layout[0] == old);
      return "the version";
    }
    case 4:
      packed.tokens = random_length(random, packed.tokens);
      packed.start = packed.start.resized(packed.tokens * packed.embed_dim);
      return "the rows of start";
    case 5:
      packed.in_chans = random_length(random, packed.in_chans);
      return "the images' channels";
    default:
      packed.rows =
          random.chance(0.5) ? -1 - random.between(0, 5) : packed.tokens + random.between(1, 1000);
      return "rows";
  }
}

// Anything else; it may happen to make sense.
inline void break_anyhow(Random& random, PackedModel& packed) {
  for (int64_t left = random.between(1, 3); left > 0; --left) {
    switch (random.between(0, 6)) {
      case 0:
        if (packed.vectors.size() > 0)
          packed.vectors[random.between(0, packed.vectors.size() - 1)] =
              random.pick({NAN, -1.0f, INFINITY, 1e38f});
        break;
      case 1:
        break_panels(random, packed.panels);
        break;
      case 2:
        packed.embed_dim = random_length(random, packed.embed_dim);
        packed.start = packed.start.resized(packed.tokens * packed.embed_dim);
        break;
      case 3:
        packed.height = random_length(random, packed.height);
        packed.width = random.chance(0.5) ? packed.width : random_length(random, packed.width);
        break;
      case 4:
        packed.bfloat16_products = !packed.bfloat16_products;
        break;
      default: {
        int64_t& number = packed.layout[random.between(0, packed.layout.size() - 1)];
        number = random_number(random, number);
      }
    }
  }
}

// Calls once, with arrays of the sizes that `packed` gives. Returns whether it was refused.
inline bool is_refused(const PackedModel& packed, int64_t batch, Pool& pool) {
  const int64_t rows = std::max<int64_t>(0, packed.rows);
  const int64_t size = packed.in_chans * packed.height * packed.width;
  const Exact<float> images(batch * size, 0, 0.5f);
  Exact<float> out(batch * rows * packed.embed_dim, 0, UNWRITTEN);
  try {
    encode(packed, images.data(), batch, out.data(), pool.threads());
  } catch (const std::runtime_error& error) {
    const std::string sentence = error.what();
    require(
        sentence.size() > 20 && sentence.back() == '.' && sentence.find('\n') == std::string::npos,
        "refused, but not in one sentence: " + sentence);
    return true;
  }
  return false;
}

inline void fuzz_broken(uint64_t seed, Pools& pools, std::string& what, BrokenCount& count) {
  Random random(seed);
  const Model model = random_model(random, {40, 3, 20, 40, 12, 3});
  PackedModel packed = pack(model);
  const PackedModel good = packed;
  const int64_t batch = random.between(0, 3);
  Pool& pool = *pools.all[random.between(0, int64_t(pools.all.size()) - 1)];
  what = "broken: batch " + std::to_string(batch) + ", " + describe(model);
  require(!is_refused(good, batch, pool), "the model was refused before anything was broken");

  const bool sure = random.chance(0.5);
  what += sure ? "; broken is " + break_surely(random, packed) : "; broken is anything";
  if (!sure) break_anyhow(random, packed);
  const bool refused = is_refused(packed, batch, pool);
  require(refused || !sure, "computed what does not fit");
  (refused ? count.refused : count.computed) += 1;

  // What was refused leaves nothing behind that the next call would stumble over.
  const int64_t elements = batch * model.rows * model.embed_dim;
  Exact<float> images(batch * model.image_elements(), 0, 0.5f);
  Exact<float> out(elements, 0, UNWRITTEN), fresh(elements, 0, UNWRITTEN);
  encode(good, images.data(), batch, out.data(), pool.threads());
  std::thread([&] {
    Pool alone(1);
    encode(good, images.data(), batch, fresh.data(), alone.threads());
  }).join();
  require(same_bits(out.data(), fresh.data(), elements), "not the same bits after a refusal");
}

}  // namespace stress
