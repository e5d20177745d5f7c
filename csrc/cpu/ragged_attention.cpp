// Shares out the heads of all images over the caller's threads, and chooses the instruction set.

#include "../ragged_attention.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "isa.h"
#include "ragged_attention_kernels.h"
#include "scratch.h"

namespace vitslim {

const RaggedAttentionKernels& ragged_attention_kernels() {
#if defined(__x86_64__)
  if (current_isa() >= Isa::AVX512) return ragged_attention_avx512;
  if (current_isa() == Isa::AVX2) return ragged_attention_avx2;
#endif
  return ragged_attention_portable;
}

namespace {

struct Task {
  int64_t image, head, begin, end;
};

// Calls body(task) for every task; each thread takes the next one when it is free, because heads of
// different widths, and cores that others use too, take different times.
template <typename Body>
void run_tasks(const std::vector<Task>& tasks, const Threads& threads, const Body& body) {
  struct Context {
    const std::vector<Task>& tasks;
    const Body& body;
    std::atomic<size_t> next{0};
  } context{tasks, body};
  const auto work = [](int64_t, int64_t, void* pointer) {
    Context& context = *static_cast<Context*>(pointer);
    for (size_t i; (i = context.next++) < context.tasks.size();) context.body(context.tasks[i]);
  };
  const int64_t workers = std::min<int64_t>(threads.count, int64_t(tasks.size()));
  if (workers > 0) threads.run(workers, work, &context);
}

// The heads of an image from wide to narrow, so that what is left for the end is small.
std::vector<int64_t> heads_by_width(const RaggedAttentionShape& shape) {
  const auto width = [&](int64_t h) { return shape.head_offsets[h + 1] - shape.head_offsets[h]; };
  std::vector<int64_t> heads(shape.heads);
  for (int64_t h = 0; h < shape.heads; ++h) heads[h] = h;
  std::stable_sort(heads.begin(), heads.end(),
                   [&](int64_t a, int64_t b) { return width(a) > width(b); });
  return heads;
}

}  // namespace

void ragged_attention_forward_cpu(const RaggedAttentionForward& call, const Threads& threads) {
  const RaggedAttentionShape& shape = call.shape;
  const RaggedAttentionKernels& kernel = ragged_attention_kernels();
  // Few heads are cut into ranges of queries, each a multiple of the widest vector, so that every
  // thread gets about four pieces. A query's result does not depend on the cut.
  const int64_t heads = std::max<int64_t>(1, shape.batch * shape.heads);
  const int64_t blocks = (shape.tokens + 15) / 16;
  const int64_t wanted = threads.count == 1 ? 1 : (4 * threads.count + heads - 1) / heads;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, blocks / 2));

  std::vector<Task> tasks;
  tasks.reserve(shape.batch * shape.heads * parts);
  const std::vector<int64_t> order = heads_by_width(shape);
  for (int64_t image = 0; image < shape.batch; ++image)
    for (const int64_t head : order)
      for (int64_t part = 0; part < parts; ++part)
        tasks.push_back({image, head, part * blocks / parts * 16,
                         std::min(shape.tokens, (part + 1) * blocks / parts * 16)});

  run_tasks(tasks, threads, [&](const Task& task) {
    float* memory = thread_scratch(kernel.forward_scratch(shape, task.head));
    kernel.forward(call, task.image, task.head, task.begin, task.end, memory);
  });
}

void ragged_attention_backward_cpu(const RaggedAttentionBackward& call, const Threads& threads) {
  const RaggedAttentionShape& shape = call.shape;
  const RaggedAttentionKernels& kernel = ragged_attention_kernels();
  std::vector<Task> tasks;
  tasks.reserve(shape.batch * shape.heads);
  const std::vector<int64_t> order = heads_by_width(shape);
  for (int64_t image = 0; image < shape.batch; ++image)
    for (const int64_t head : order) tasks.push_back({image, head, 0, shape.tokens});

  run_tasks(tasks, threads, [&](const Task& task) {
    float* memory = thread_scratch(kernel.backward_scratch(shape, task.head));
    kernel.backward(call, task.image, task.head, memory);
  });
}

}  // namespace vitslim
