// What the two kernels of the attention's backward share.
//
// With q, k, v, G the columns of one head in qkv and grad_out, z its part of the mask:
//   S = scale round(q z^2) k^T    P = exp(S - lse)    delta = rowsum(G out)
//   dS = P (G round(v z)^T - delta)
//   R_v = P^T G    R_k = scale dS^T q    R_q = scale dS k
//   grad_v = z R_v    grad_k = z^2 R_k    grad_q = z^2 R_q
//   grad_z = sum over tokens of R_v v + 2 z R_k k
// The terms of q and k in grad_z are the same number, so that nobody divides by z and nobody adds
// up R_q q. round() is to what tensor cores multiply, and the forward kernel's own: where S is
// large, exp(S - lse) would tell another rounding from it.

#pragma once

#include <cmath>
#include <type_traits>

#include "heads.cuh"
#include "launch.cuh"

namespace vitslim {

constexpr float LOG2_E = 1.44269504088896341f;

template <typename E>
struct BackwardArguments {
  const E* qkv;       // [batch, tokens, 3 * D]
  const E* grad_out;  // [batch, tokens, D]
  const E* out;       // [batch, tokens, D]
  const float* lse;   // [batch, heads, tokens]
  const float* mask;  // [D], or null
  E* grad_qkv;        // [batch, tokens, 3 * D]
  float* grad_mask;   // [rows, D], or null
  float* delta;       // [batch, heads, tokens]
  int64_t qkv_batch_stride, qkv_token_stride, grad_out_batch_stride, grad_out_token_stride;
  int batch, tokens, heads;
  float scale;
  // Whether heads whose offset is aligned have rows on 16 bytes.
  bool qkv_aligned, grad_out_aligned, out_aligned, grad_qkv_aligned;
};

template <typename E>
BackwardArguments<E> backward_arguments(const RaggedAttentionBackward& call) {
  const RaggedAttentionShape& shape = call.shape;
  const int64_t columns = shape.head_offsets[shape.heads];
  BackwardArguments<E> arguments;
  arguments.qkv = static_cast<const E*>(call.qkv);
  arguments.grad_out = static_cast<const E*>(call.grad_out);
  arguments.out = static_cast<const E*>(call.out);
  arguments.lse = call.lse;
  arguments.mask = call.mask;
  arguments.grad_qkv = static_cast<E*>(call.grad_qkv);
  arguments.grad_mask = call.grad_mask;
  arguments.delta = call.delta;
  arguments.qkv_batch_stride = shape.qkv_batch_stride;
  arguments.qkv_token_stride = shape.qkv_token_stride;
  arguments.grad_out_batch_stride = call.grad_out_batch_stride;
  arguments.grad_out_token_stride = call.grad_out_token_stride;
  arguments.batch = int(shape.batch);
  arguments.tokens = int(shape.tokens);
  arguments.heads = int(shape.heads);
  arguments.scale = shape.scale;
  arguments.qkv_aligned =
      rows_aligned<E>(call.qkv, shape.qkv_batch_stride, shape.qkv_token_stride, columns);
  arguments.grad_out_aligned =
      rows_aligned<E>(call.grad_out, call.grad_out_batch_stride, call.grad_out_token_stride, 0);
  arguments.out_aligned = rows_aligned<E>(call.out, 0, columns, 0);
  arguments.grad_qkv_aligned = rows_aligned<E>(call.grad_qkv, 0, columns, 0);
  return arguments;
}

template <typename E>
auto backward_description(const BackwardArguments<E>& arguments, const HeadTable& table) {
  return [&](std::ostream& s) {
    s << "batch " << arguments.batch << ", tokens " << arguments.tokens << ", heads "
      << arguments.heads << " up to " << table.heads[0].width << " wide";
  };
}

// Which head of the table and which image a block works on, and from which of its rows on.
struct Place {
  int slot, image, first;
};

// One head of one image. What it gives is computed where it is asked for, and its place is read
// there from shared memory: registers are dear.
template <typename E>
struct BackwardHead {
  const BackwardArguments<E>& call;
  const HeadTable& table;
  const Place& place;

  // From a token on. Part 0 is of q, 1 of k, 2 of v.
  __device__ __forceinline__ Rows<const E> part(int part, int token) const {
    const Head head = entry();
    return {call.qkv + int64_t(place.image) * call.qkv_batch_stride +
                token * call.qkv_token_stride + part * int64_t(table.columns) + head.offset,
            call.qkv_token_stride, call.tokens - token, head.width,
            call.qkv_aligned && aligned(head)};
  }
  __device__ __forceinline__ Rows<E> grad_part(int part, int token) const {
    const Head head = entry();
    const int64_t row = int64_t(place.image) * call.tokens + token;
    return {call.grad_qkv + (3 * row + part) * table.columns + head.offset,
            3 * int64_t(table.columns), call.tokens - token, head.width,
            call.grad_qkv_aligned && aligned(head)};
  }
  __device__ __forceinline__ Rows<const E> grad_out(int token) const {
    const Head head = entry();
    return {call.grad_out + int64_t(place.image) * call.grad_out_batch_stride +
                token * call.grad_out_token_stride + head.offset,
            call.grad_out_token_stride, call.tokens - token, head.width,
            call.grad_out_aligned && aligned(head)};
  }
  __device__ __forceinline__ Rows<const E> out(int token) const {
    const Head head = entry();
    const int64_t row = int64_t(place.image) * call.tokens + token;
    return {call.out + row * table.columns + head.offset, table.columns, call.tokens - token,
            head.width, call.out_aligned && aligned(head)};
  }
  // Of a token, in lse and delta.
  __device__ __forceinline__ int64_t statistic(int token) const {
    return (int64_t(place.image) * call.heads + entry().index) * call.tokens + token;
  }
  __device__ __forceinline__ int width() const { return entry().width; }
  __device__ __forceinline__ const float* mask() const {
    return call.mask ? call.mask + entry().offset : nullptr;
  }
  // A row of grad_mask, the head's columns.
  __device__ __forceinline__ float* grad_mask(int64_t row) const {
    return call.grad_mask + row * table.columns + entry().offset;
  }

 private:
  __device__ __forceinline__ const Head& entry() const { return table.heads[place.slot]; }
  __device__ __forceinline__ static bool aligned(const Head& head) {
    return head.offset % (16 / int(sizeof(E))) == 0;
  }
};

// What the gradient of S needs of a query; lse in powers of two.
struct alignas(8) QueryRow {
  float lse, delta;
};

// The start of shared memory, for all threads to read.
constexpr int PLACE_BYTES = 16;
__device__ inline Place& place_block(int slot, int image, int first) {
  Place* place = reinterpret_cast<Place*>(shared_memory());
  if (threadIdx.x == 0) *place = {slot, image, first};
  __syncthreads();
  return *place;
}

// Cuts shared memory, behind the place, into arrays, each on a multiple of 16 bytes.
struct SharedArrays {
  unsigned char* next;

  template <int W, int PARTS>
  __device__ Tile<W, PARTS> tile(int rows) {
    return {take(Tile<W, PARTS>::bytes(rows)), rows};
  }
  __device__ float* floats(int count) { return reinterpret_cast<float*>(take(4 * count)); }
  __device__ QueryRow* query_rows(int count) {
    return reinterpret_cast<QueryRow*>(take(int(sizeof(QueryRow)) * count));
  }
  __device__ unsigned char* take(int bytes) {
    unsigned char* array = next;
    next += (bytes + 15) / 16 * 16;
    return array;
  }
};

// delta of a token by 8 lanes that all come here; every one of them receives it.
template <typename E>
__device__ inline float row_delta(const BackwardHead<E>& head, int token) {
  float sum = 0.0f;
  const int width = head.width();
  // All lanes go round this loop together, as the compiler has to know for the exchange below.
  for (int first = 0; first < width; first += 64) {
    const int column = first + int(threadIdx.x) % 8 * 8;
    if (token >= head.call.tokens || column >= width) continue;
    const Rows<const E> grad_out = head.grad_out(token), out = head.out(token);
    float x[8], y[8];
    load_chunk(grad_out.first + column, width - column, grad_out.aligned, x);
    load_chunk(out.first + column, width - column, out.aligned, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(x[i], y[i], sum);
  }
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  return sum;
}

// z in shared memory: ones without a mask, zeros beyond the head.
template <int W>
__device__ inline void fill_mask(float* z, const float* mask, int width, Team team) {
  for (int c = team.index; c < W; c += team.count) z[c] = c >= width ? 0.0f : mask ? mask[c] : 1.0f;
}

// Every number of `source` times factor(column). A thread takes the chunks that it took in fill(),
// and so needs to wait for its own copies only.
template <typename E, int W, typename Factor>
__device__ __forceinline__ void scale_tile(const Tile<W, 1>& target, const Tile<W, 1>& source,
                                           int rows, Team team, Factor factor) {
  for (int i = team.index; i < rows * (W / 8); i += team.count) {
    const int row = i / (W / 8), chunk = i % (W / 8);
    union {
      uint4 words;
      uint32_t pairs[4];
    } numbers = {*reinterpret_cast<const uint4*>(source.at(0, row, chunk))};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float low, high;
      unpack<E>(numbers.pairs[k], low, high);
      const int column = chunk * 8 + 2 * k;
      numbers.pairs[k] = pack<E>(low * factor(column), high * factor(column + 1));
    }
    *reinterpret_cast<uint4*>(target.at(0, row, chunk)) = numbers.words;
  }
}

}  // namespace vitslim
