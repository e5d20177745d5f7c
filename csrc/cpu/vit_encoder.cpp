// Who works on which image: a thread takes whole images while there are enough of them, the last
// ones are shared by teams.

#include "../vit_encoder.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "scratch.h"
#include "team.h"
#include "vit_encoder_image.h"
#include "vit_encoder_layout.h"

namespace vitslim {
namespace {

// A member with fewer rows than this waits more than it works.
constexpr int64_t ROWS_OF_A_MEMBER = 8;

// Who does what: `alone` images are taken by single threads as they become free, the others by a
// team each.
struct Crew {
  int64_t threads, alone, teams, members;

  Crew(int64_t batch, int64_t tokens, int64_t count) : threads(count) {
    teams = batch % threads;
    alone = batch - teams;
    const int64_t useful = std::max<int64_t>(1, tokens / ROWS_OF_A_MEMBER);
    members = teams ? std::min(threads / teams, useful) : 0;
    if (!alone) threads = teams * members;
  }
};

struct Worker {
  Shared shared;
  Own own;
};

// What a calling thread keeps from call to call.
struct Kept {
  EncoderLayout layout;
  std::vector<Worker> workers;
  std::vector<Barrier> barriers;
};

}  // namespace

void vit_encoder_cpu(const VitEncoder& call, const Threads& threads) {
  static thread_local Kept kept;
  kept.layout.read(call);
  if (call.batch == 0 || call.rows == 0) return;
  const Encoder encoder(call, kept.layout);
  const Crew crew(call.batch, call.tokens, std::max<int64_t>(1, threads.count));

  // A team uses the first member's shared memory. All memory is there before the threads start,
  // because one that failed alone would leave its team waiting.
  if (int64_t(kept.workers.size()) < crew.threads) kept.workers.resize(crew.threads);
  if (int64_t(kept.barriers.size()) < crew.teams) kept.barriers = std::vector<Barrier>(crew.teams);
  const auto carve = [&](float* memory) {
    Carver carver(memory);
    for (int64_t i = 0; i < crew.threads; ++i) {
      encoder.carve(&kept.workers[i].own, carver);
      const int64_t members = crew.teams && i % crew.members == 0 ? crew.members : 1;
      if (crew.alone || i % crew.members == 0)
        encoder.carve(&kept.workers[i].shared, members, carver);
    }
    return carver.used();
  };
  carve(thread_scratch(carve(nullptr)));

  struct Context {
    const Encoder& encoder;
    const Crew& crew;
    Worker* workers;
    Barrier* barriers;
    std::atomic<int64_t> next{0};
  } context{encoder, crew, kept.workers.data(), kept.barriers.data()};
  // A call plays the workers begin..end: usually one, all of them where the caller is one of
  // several threads already.
  const auto work = [](int64_t begin, int64_t end, void* pointer) {
    Context& c = *static_cast<Context*>(pointer);
    const Worker& self = c.workers[begin];
    Barrier nobody;
    for (int64_t image; (image = c.next++) < c.crew.alone;)
      c.encoder.run(image, {0, 1}, 1, self.shared, self.own, nobody);
    for (int64_t team = 0; team < c.crew.teams; ++team) {
      const int64_t first = team * c.crew.members;
      const Range here{std::max(begin, first) - first,
                       std::min(end, first + c.crew.members) - first};
      if (here.count() <= 0) continue;
      // Until then, the first member may still have an image of its own in the team's memory.
      if (c.crew.alone && here.count() < c.crew.members)
        c.barriers[team].arrive(here.count(), c.crew.members);
      c.encoder.run(c.crew.alone + team, here, c.crew.members, c.workers[first].shared, self.own,
                    c.barriers[team]);
    }
  };
  threads.run(crew.threads, work, &context);
}

}  // namespace vitslim
