// Shares out the rows and panels of a packed linear layer over the caller's threads, and chooses
// the instruction set.

#include "../packed_linear.h"

#include <algorithm>
#include <atomic>

#include "isa.h"
#include "packed_linear_kernels.h"
#include "scratch.h"
#include "split.h"

namespace vitslim {
namespace {

// Rows of x that a thread takes through the panels at a time.
constexpr int64_t ROWS = 128;
constexpr int64_t GROUP = 4;  // panels of the widest tile

}  // namespace

const PackedLinearKernels& packed_linear_kernels() {
#if defined(VITSLIM_HAS_AMX_BF16)
  if (current_isa() == Isa::AMX_BF16) return packed_linear_amx_bf16;
#endif
#if defined(VITSLIM_HAS_AVX512_BF16)
  if (current_isa() == Isa::AVX512_BF16) return packed_linear_avx512_bf16;
#endif
#if defined(__x86_64__)
  if (current_isa() == Isa::AVX512) return packed_linear_avx512;
  if (current_isa() == Isa::AVX2) return packed_linear_avx2;
#endif
  return packed_linear_portable;
}

int64_t panel_elements(int64_t in, int64_t out, DType dtype) {
  const int64_t depth = dtype == DType::FLOAT32 ? in : (in + 1) / 2 * 2;
  return (out + PANEL - 1) / PANEL * PANEL * depth;
}

void packed_linear_cpu(const PackedLinear& call, const Threads& threads) {
  const PackedLinearKernels& kernels = packed_linear_kernels();
  const PackedWeight& weight = call.weight;
  const int64_t groups = ((weight.out + PANEL - 1) / PANEL + GROUP - 1) / GROUP;
  if (call.rows == 0 || groups == 0) return;
  const Split rows(call.rows, ROWS);
  // Few rows are shared out by columns as well, about four pieces for each thread. Each piece of
  // columns normalises its rows anew, which is little beside the product.
  const int64_t wanted = threads.count == 1 ? 1 : 4 * threads.count / rows.pieces;
  const Split columns(groups, groups / std::clamp<int64_t>(wanted, 1, groups));

  struct Context {
    const PackedLinear& call;
    const PackedLinearKernels& kernels;
    const Split &rows, &columns;
    std::atomic<int64_t> next{0};
  } context{call, kernels, rows, columns};
  const auto work = [](int64_t, int64_t, void* pointer) {
    Context& c = *static_cast<Context*>(pointer);
    const PackedLinear& call = c.call;
    const PackedWeight& weight = call.weight;
    const int64_t panels = (weight.out + PANEL - 1) / PANEL;
    float *memory = nullptr, *left = nullptr;
    const auto carve = [&](float* from) {
      Carver carver(from);
      memory =
          carver.take(c.kernels.scratch(ROWS, weight.in, weight.dtype, weight.bfloat16_products));
      left = carver.take(call.norm ? ROWS * weight.in : 0);
      return carver.used();
    };
    carve(thread_scratch(carve(nullptr)));
    for (int64_t i; (i = c.next++) < c.rows.pieces * c.columns.pieces;) {
      const int64_t row = c.rows.begin(i / c.columns.pieces);
      const int64_t count = c.rows.begin(i / c.columns.pieces + 1) - row;
      const int64_t column = i % c.columns.pieces;
      Product product{};
      product.x = call.x + row * call.x_stride;
      product.x_stride = call.x_stride;
      if (call.norm) {
        c.kernels.normalise(product.x, call.x_stride, count, weight.in, *call.norm, nullptr, left,
                            weight.in);
        product.x = left;
        product.x_stride = weight.in;
      }
      product.rows = count;
      product.weight = weight;
      product.panel_begin = c.columns.begin(column) * GROUP;
      product.panel_end = std::min(panels, c.columns.begin(column + 1) * GROUP);
      product.depth_end = weight.in;
      product.bias = call.bias;
      product.activation = call.activation;
      if (call.residual) product.residual = call.residual + row * call.residual_stride;
      product.residual_stride = call.residual_stride;
      product.scale = call.scale;
      product.y = call.y + row * call.y_stride;
      product.y_stride = call.y_stride;
      c.kernels.multiply(product, memory);
    }
  };
  threads.run(std::min(threads.count, rows.pieces * columns.pieces), work, &context);
}

}  // namespace vitslim
