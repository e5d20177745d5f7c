// The backward of attention for any number of tokens, heads up to 128 wide, and float32.
//
// A block owns 64 rows of one head of one image, 16 to a warp, in one of two roles that need
// nothing of each other:
//   keys      holds K and V', streams Q, round(Q z^2) and G; writes grad_k, grad_v and its row of
//             grad_mask: row image * blocks of keys + block
//   queries   holds round(Q z^2) and G, streams K and V'; writes grad_q
// S and dP are so computed twice, 7 products instead of 5, but nothing has to be added up between
// blocks. A first kernel leaves delta in global memory.

#pragma once

#include "ragged_attention_backward_products.cuh"

namespace vitslim {

constexpr int STREAMING_ROWS = 64;  // of a block
constexpr int DELTA_ROWS = 32;      // of a block of the first kernel

inline __device__ __host__ int64_t streaming_blocks(int64_t tokens) {
  return (tokens + STREAMING_ROWS - 1) / STREAMING_ROWS;
}

template <typename E, int WIDEST, int PARTS>
struct Streaming {
  // Wide float32 rows take so much shared memory that a block takes its rows in two passes.
  static constexpr int ROWS = sizeof(E) == 4 && WIDEST > 64 ? 32 : 64;
  static constexpr int WARPS = ROWS / 16, THREADS = 32 * WARPS;
  // And their R_v and R_k so many registers that one comes after the other, for an eighth product.
  static constexpr bool APART = ROWS < STREAMING_ROWS;
  // How many blocks a processor should have room for: this many registers are left.
  static constexpr int BLOCKS = sizeof(E) == 4 || WIDEST > 64 ? 2 : 3;
  // Whether left operands stay in registers.
  static constexpr bool HELD = sizeof(E) == 2;

  static constexpr int bytes(int padded_width) {
    using Stream = QueryStream<E, 16, PARTS>;
    return PLACE_BYTES + 4 * padded_width * (1 + WARPS) +
           Stream::STAGES * Stream::ROWS * int(sizeof(QueryRow)) +
           2 * PARTS * padded_width * (2 * ROWS + 3 * Stream::STAGES * Stream::ROWS);
  }
};

template <typename E>
__global__ void __launch_bounds__(8 * DELTA_ROWS, 4)
    ragged_attention_backward_delta_kernel(const __grid_constant__ BackwardArguments<E> call,
                                           const __grid_constant__ HeadTable table) {
  const int blocks = (call.tokens + DELTA_ROWS - 1) / DELTA_ROWS;
  const int image = int(blockIdx.x) / blocks % call.batch;
  const BackwardHead<E> head{call, table,
                             place_block(int(blockIdx.x) / blocks / call.batch, image, 0)};
  const int row = int(blockIdx.x) % blocks * DELTA_ROWS + int(threadIdx.x) / 8;
  const float delta = row_delta(head, row);
  if (row < head.call.tokens && threadIdx.x % 8 == 0) call.delta[head.statistic(row)] = delta;
}

// grad_k and grad_v, or one of them, of the keys from the place's first on, and what they add to
// grad_z.
template <typename E, int W, int PARTS, typename Shape, bool VALUES, bool KEYS>
__device__ __forceinline__ void stream_queries(const BackwardHead<E>& head, float scale) {
  using T = Operand<E>;
  using Stream = QueryStream<E, W, PARTS>;
  constexpr int HELD = Shape::HELD ? W / 16 : 0;
  SharedArrays arrays{shared_memory() + PLACE_BYTES};
  float* z = arrays.floats(W);
  float* sums = arrays.floats(Shape::WARPS * W);
  QueryRow* rows = arrays.query_rows(Stream::STAGES * Stream::ROWS);
  const Tile<W, PARTS> k = arrays.tile<W, PARTS>(Shape::ROWS);
  const Tile<W, PARTS> v = arrays.tile<W, PARTS>(Shape::ROWS);
  const Stream stream(head, z, arrays);
  const Team team = block_team();
  const Lane<W> lane = Lane<W>::of_thread();
  const int stripe = warp_of_block() * 16;

  fill_mask<W>(z, head.mask(), head.width(), team);
  __syncthreads();
  constexpr int ROWS = Stream::ROWS, STAGES = Stream::STAGES;
  const int tokens = head.call.tokens;
  QueryRow next;
  const auto begin = [&](int query) {
    stream.begin(query);
    if (team.index < ROWS) {
      const int own = query + team.index;
      // A query that does not exist gives every key the weight exp(-inf).
      next = own < tokens ? QueryRow{head.call.lse[head.statistic(own)] * LOG2_E,
                                     head.call.delta[head.statistic(own)]}
                          : QueryRow{INFINITY, 0.0f};
    }
  };
  fill(k, head.part(1, head.place.first), Shape::ROWS, team);
  fill_scaled(v, head.part(2, head.place.first), Shape::ROWS, team, [z](int c) { return z[c]; });
  begin(0);
  // Beside R_k and R_v there is room for one of the two.
  Stripe<W, PARTS, HELD> key_stripe{k.from(stripe), nullptr};
  Stripe<W, PARTS, 0> value_stripe{v.from(stripe), nullptr};
  KeySums<W, VALUES, KEYS> sum;
  const int known = tokens - head.place.first - stripe;
#pragma unroll 1
  for (int query = 0; query < tokens; query += ROWS) {
    if (STAGES == 1 && query > 0) {
      __syncthreads();
      begin(query);
    }
    stream.arrive(query);
    if (team.index < ROWS) rows[query % (STAGES * ROWS) + team.index] = next;
    __syncthreads();
    if (STAGES == 2 && query + ROWS < tokens) begin(query + ROWS);
    if (query == 0) {
      key_stripe.load(lane);
      value_stripe.load(lane);
    }
    if (known <= 0) continue;
#pragma unroll 1
    for (int row = query; row < query + ROWS && row < tokens; row += 16) {
      const int place = row % (STAGES * ROWS);
      Fragment<PARTS> scores;
      sum.template add<T>(key_stripe, value_stripe, known, stream.queries(), place, rows + place,
                          lane, scale * LOG2_E, scores);
    }
  }

  // Of V' only the warp itself had use for its rows, and the same holds of K.
  __syncwarp();
  const int first = head.place.first;
  store_keys(head, first + stripe, sum, k.from(stripe), v.from(stripe), z, scale,
             sums + stripe / 16 * W);
  add_mask_sums<W>(head, sums, Shape::WARPS,
                   head.place.image * streaming_blocks(head.call.tokens) + first / STREAMING_ROWS,
                   first % STREAMING_ROWS > 0 || !VALUES);
  __syncthreads();
}

// grad_q of the queries from the place's first on.
template <typename E, int W, int PARTS, typename Shape>
__device__ __forceinline__ void stream_keys(const BackwardHead<E>& head, float scale) {
  using T = Operand<E>;
  using Stream = QueryStream<E, W, PARTS>;
  constexpr int HELD = Shape::HELD ? W / 16 : 0;
  constexpr int ROWS = Stream::ROWS, STAGES = Stream::STAGES;
  SharedArrays arrays{shared_memory() + PLACE_BYTES};
  float* z = arrays.floats(W);
  const Tile<W, PARTS> q = arrays.tile<W, PARTS>(Shape::ROWS);
  const Tile<W, PARTS> grad_out = arrays.tile<W, PARTS>(Shape::ROWS);
  const Tile<W, PARTS> k = arrays.tile<W, PARTS>(STAGES * ROWS);
  const Tile<W, PARTS> v = arrays.tile<W, PARTS>(STAGES * ROWS);
  const Team team = block_team();
  const Lane<W> lane = Lane<W>::of_thread();
  const int stripe = warp_of_block() * 16;

  fill_mask<W>(z, head.mask(), head.width(), team);
  __syncthreads();
  const auto masked = [z](int c) { return z[c]; };
  const auto begin = [&](int block) {
    const Team team = block_team_here();
    const int row = block % STAGES * ROWS;
    fill(k.from(row), head.part(1, block * ROWS), ROWS, team);
    if constexpr (sizeof(E) == 2) {
      fill(v.from(row), head.part(2, block * ROWS), ROWS, team);
    } else {
      fill_scaled(v.from(row), head.part(2, block * ROWS), ROWS, team, masked);
    }
    copy_async_commit();
  };
  fill_scaled(q, head.part(0, head.place.first), Shape::ROWS, team,
              [z](int c) { return z[c] * z[c]; });
  fill(grad_out, head.grad_out(head.place.first), Shape::ROWS, team);
  begin(0);
  QueryRow rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = head.place.first + stripe + lane_row() + half * 8;
    rows[half] = query < head.call.tokens ? QueryRow{head.call.lse[head.statistic(query)] * LOG2_E,
                                                     head.call.delta[head.statistic(query)]}
                                          : QueryRow{INFINITY, 0.0f};
  }
  Stripe<W, PARTS, HELD> query_stripe{q.from(stripe), nullptr};
  Stripe<W, PARTS, HELD> grad_stripe{grad_out.from(stripe), nullptr};
  float sum[W / 8][4] = {};
  const bool busy = head.place.first + stripe < head.call.tokens;
  const int blocks = (head.call.tokens + ROWS - 1) / ROWS;
  for (int block = 0; block < blocks; ++block) {
    if (STAGES == 1 && block > 0) {
      __syncthreads();
      begin(block);
    }
    const int stage = block % STAGES * ROWS;
    copy_async_wait<0>();
    if constexpr (sizeof(E) == 2) {
      if (head.call.mask)
        scale_tile<E>(v.from(stage), v.from(stage), ROWS, block_team_here(), masked);
    }
    __syncthreads();
    if (STAGES == 2 && block + 1 < blocks) begin(block + 1);
    if (block == 0) {
      query_stripe.load(lane);
      grad_stripe.load(lane);
    }
    if (!busy) continue;
#pragma unroll 1
    for (int row = 0; row < ROWS && block * ROWS + row < head.call.tokens; row += 16) {
      float weights[2][4], grads[2][4];
      multiply_transposed<T>(weights, query_stripe, k, stage + row, lane);
      multiply_transposed<T>(grads, grad_stripe, v, stage + row, lane);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const QueryRow& query = rows[i % 4 / 2];
        const int key = block * ROWS + row + i / 4 * 8 + lane_column() + i % 2;
        // Keys that do not exist have S = 0, and exp(0 - lse) may be anything.
        const float weight =
            key < head.call.tokens
                ? exp2_fast(fmaf(weights[i / 4][i % 4], scale * LOG2_E, -query.lse))
                : 0.0f;
        grads[i / 4][i % 4] = weight * (grads[i / 4][i % 4] - query.delta);
      }
      Fragment<PARTS> scores;
      operand_of<T, PARTS>(scores, grads[0], grads[1]);
      multiply_add<T, W>(sum, scores, k, stage + row, lane);
    }
  }
#pragma unroll
  for (int n = 0; n < W / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float factor = z[n * 8 + lane_column() + i % 2];
      sum[n][i] *= scale * (factor * factor);
    }
  store_rows<W>(head.grad_part(0, head.place.first + stripe), sum, grad_out.from(stripe).first);
  __syncthreads();
}

// Blocks are, from the slowest to the fastest: heads, images, roles, blocks of rows.
template <typename E, int WIDEST, int PARTS>
__global__ void __launch_bounds__(Streaming<E, WIDEST, PARTS>::THREADS,
                                  Streaming<E, WIDEST, PARTS>::BLOCKS)
    ragged_attention_backward_streaming_kernel(const __grid_constant__ BackwardArguments<E> call,
                                               const __grid_constant__ HeadTable table) {
  using Shape = Streaming<E, WIDEST, PARTS>;
  const int blocks = int(streaming_blocks(call.tokens));
  const int block = int(blockIdx.x) % blocks;
  const bool keys = int(blockIdx.x) / blocks % 2 == 0;
  const int image = int(blockIdx.x) / blocks / 2 % call.batch;
  const int slot = int(blockIdx.x) / blocks / 2 / call.batch, width = table.heads[slot].width;
  if (width == 0) return;
  Place& place = place_block(slot, image, block * STREAMING_ROWS);
  with_width<WIDEST, (WIDEST > 64 ? 80 : 16)>(width, [&](auto padded_width) {
    constexpr int W = decltype(padded_width)::value;
    const BackwardHead<E> head{call, table, place};
#pragma unroll 1
    for (int pass = 0; pass < STREAMING_ROWS / Shape::ROWS; ++pass) {
      if (pass > 0) {
        if (threadIdx.x == 0) place.first += Shape::ROWS;
        __syncthreads();
        if (place.first >= call.tokens) break;
      }
      if (!keys) {
        stream_keys<E, W, PARTS, Shape>(head, call.scale);
      } else if constexpr (Shape::APART) {
        stream_queries<E, W, PARTS, Shape, true, false>(head, call.scale);
        stream_queries<E, W, PARTS, Shape, false, true>(head, call.scale);
      } else {
        stream_queries<E, W, PARTS, Shape, true, true>(head, call.scale);
      }
    }
  });
}

// Heads up to here go to kernels of their own, which leave room for more blocks.
constexpr int STREAMING_NARROW = 64;

// The heads [begin, end) of a table.
inline HeadTable part_of(const HeadTable& table, int begin, int end) {
  HeadTable part = table;
  part.count = end - begin;
  std::copy(table.heads + begin, table.heads + end, part.heads);
  return part;
}

template <typename E, int WIDEST, int PARTS>
void launch_streaming_heads(const BackwardArguments<E>& arguments, const HeadTable& table,
                            const Gpu& gpu) {
  if (table.count == 0) return;
  using Shape = Streaming<E, WIDEST, PARTS>;
  const int64_t blocks = 2 * streaming_blocks(arguments.tokens) * arguments.batch * table.count;
  launch("ragged_attention_backward_streaming_kernel",
         ragged_attention_backward_streaming_kernel<E, WIDEST, PARTS>,
         Grid{blocks, Shape::THREADS, Shape::bytes(padded_width(table.heads[0].width))}, gpu,
         backward_description(arguments, table), arguments, table);
}

template <typename E, int PARTS>
void launch_streaming(const RaggedAttentionBackward& call, const Gpu& gpu) {
  const BackwardArguments<E> arguments = backward_arguments<E>(call);
  for (const HeadTable& table : head_tables(call.shape)) {
    const int64_t row_blocks = (arguments.tokens + DELTA_ROWS - 1) / DELTA_ROWS;
    launch("ragged_attention_backward_delta_kernel", ragged_attention_backward_delta_kernel<E>,
           Grid{row_blocks * arguments.batch * table.count, 8 * DELTA_ROWS, PLACE_BYTES}, gpu,
           backward_description(arguments, table), arguments, table);
    int wide = 0;
    while (wide < table.count && table.heads[wide].width > STREAMING_NARROW) ++wide;
    launch_streaming_heads<E, int(CUDA_HEAD_WIDTH), PARTS>(arguments, part_of(table, 0, wide), gpu);
    launch_streaming_heads<E, STREAMING_NARROW, PARTS>(arguments, part_of(table, wide, table.count),
                                                       gpu);
  }
}

}  // namespace vitslim
