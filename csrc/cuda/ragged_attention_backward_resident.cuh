// The backward of attention for up to 256 tokens, 16-bit numbers and heads up to 64 wide.
//
// A block owns a head of an image, and a warp 16 keys: their rows of V' as left operand and their
// R_k and R_v stay in registers, while blocks of 32 queries pass through shared memory, one ahead
// of those at work. dS^T, which the warps need of each other, goes to shared memory [keys][32
// queries]; behind the next barrier, some warps multiply it with K and write grad_q, before all go
// on to the next queries. Two buffers of everything make that one barrier for a block of queries. 5
// products, no exchange with other blocks: row `image` of grad_mask is the block's.
//
// Shared memory: K, V' until it is in registers and then dS^T in its place, lse and
// delta of all queries, and the blocks of queries. What grad_q leaves through becomes the sums for
// grad_z at the end.

#pragma once

#include "ragged_attention_backward_products.cuh"

namespace vitslim {

constexpr int RESIDENT_TOKENS = 256, RESIDENT_WIDTH = 64;
constexpr int RESIDENT_BLOCK = QueryStream<Half, 16, 1>::ROWS;  // queries

// Columns of grad_q that a warp computes at a time: enough to read dS^T seldom, and few enough for
// several warps to have something to do.
inline __device__ __host__ constexpr int grad_q_columns(int padded_width) {
  return padded_width == 64 ? 32 : 16;
}

// dS^T of two blocks of queries side by side. V' of 64 columns has the same size.
constexpr int SCORE_COLUMNS = 2 * RESIDENT_BLOCK;

// Of 16 warps each has 128 registers: they hold the sums and V', but of 64 columns of V' the last
// 16 go to shared memory, in each lane's order.
inline __device__ __host__ constexpr bool is_stashed(int padded_width) {
  return padded_width == RESIDENT_WIDTH;
}

inline int64_t resident_bytes(int width, int tokens) {
  const int warps = (tokens + 15) / 16, keys = 16 * warps, padded = padded_width(width);
  return PLACE_BYTES + 4 * padded + 3 * 2 * RESIDENT_BLOCK * padded * 2 + keys * padded * 2 +
         Tile<SCORE_COLUMNS, 1>::bytes(keys) + (is_stashed(padded) ? 32 * 16 * warps : 0) +
         warps * 16 * grad_q_columns(padded) * 2 + RESIDENT_TOKENS * int(sizeof(QueryRow));
}

// Which warps compute grad_q. Warps w with the same w % 4 share a tensor core; where one or two of
// the four have a warp more than the others, the others take grad_q, and all are busy all along.
__device__ inline Team grad_q_team(int warp, int warps) {
  const int heavy = warps > 4 && warps % 4 < 3 ? warps % 4 : 0, light = 4 - heavy;
  if (warp % 4 < heavy) return {warps, warps};
  return {warp / 4 * light + warp % 4 - heavy, heavy == 0 ? warps : warps / 4 * light};
}

// grad_q of the block of queries from `first` on: dS, the transpose of `scores`, times K.
template <typename E, int W>
__device__ __forceinline__ void store_grad_q(const BackwardHead<E>& head, int first,
                                             const Tile<SCORE_COLUMNS, 1>& scores,
                                             const Tile<W, 1>& k, const float* z, float scale,
                                             int warp, unsigned char* all_staging) {
  constexpr int HALVES = RESIDENT_BLOCK / 16, COLUMNS = grad_q_columns(W);
  const Team team = grad_q_team(warp, int(blockDim.x) / 32);
  unsigned char* staging = all_staging + warp * Tile<COLUMNS, 1>::bytes(16);
  const auto score_lane = Lane<SCORE_COLUMNS>::of_thread();
  const auto lane = Lane<W>::of_thread();
  for (int task = team.index; task < HALVES * (W / COLUMNS); task += team.count) {
    const int row = task % HALVES * 16, column = task / HALVES * COLUMNS;
    const int query = first + row;
    if (query >= head.call.tokens) continue;
    float sum[COLUMNS / 8][4] = {};
#pragma unroll 2
    for (int key = 0; key < k.rows; key += 16) {
      Fragment<1> left, right;
      score_lane.load_a_transposed(left, scores, key, query % SCORE_COLUMNS);
#pragma unroll
      for (int n = 0; n < COLUMNS / 16; ++n) {
        lane.load_b_transposed(right, k, key, column + 16 * n);
        multiply<E, 1>(sum[2 * n], sum[2 * n + 1], left, right);
      }
    }
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float factor = z[column + n * 8 + lane_column() + i % 2];
        sum[n][i] *= scale * (factor * factor);
      }
    Rows<E> target = head.grad_part(0, query);
    target.first += column;
    target.width -= column;
    store_rows<COLUMNS>(target, sum, staging);
  }
}

template <typename E, int W>
__device__ __forceinline__ void resident_head(const BackwardHead<E>& head, float scale) {
  using Stream = QueryStream<E, W, 1>;
  constexpr int COLUMNS = grad_q_columns(W), BLOCK = RESIDENT_BLOCK;
  constexpr bool STASHED = is_stashed(W);
  constexpr int HELD = W / 16 - STASHED;
  const int tokens = head.call.tokens;
  const Team team = block_team();
  const Lane<W> lane = Lane<W>::of_thread();
  const int warp = warp_of_block(), warps = team.count / 32, stripe = 16 * warp, keys = 16 * warps;
  // What has the same size in all blocks comes first, at addresses that need no registers.
  SharedArrays arrays{shared_memory() + PLACE_BYTES};
  float* z = arrays.floats(W);
  QueryRow* rows = arrays.query_rows(RESIDENT_TOKENS);
  const Stream stream(head, z, arrays);
  const Tile<SCORE_COLUMNS, 1> scores = arrays.tile<SCORE_COLUMNS, 1>(keys);
  const Tile<W, 1> v{scores.first, keys};
  const Tile<W, 1> k = arrays.tile<W, 1>(keys);
  uint4* stash = reinterpret_cast<uint4*>(arrays.take(STASHED ? team.count * 16 : 0));
  unsigned char* staging = arrays.take(warps * Tile<COLUMNS, 1>::bytes(16));

  fill_mask<W>(z, head.mask(), head.width(), team);
  __syncthreads();
  fill(k, head.part(1, 0), keys, team);
  if (head.call.mask) {
    fill_scaled(v, head.part(2, 0), keys, team, [z](int c) { return z[c]; });
  } else {
    fill(v, head.part(2, 0), keys, team);
  }
  stream.begin(0);
  for (int first = 0; first < tokens + BLOCK; first += team.count / 8) {
    const int token = first + team.index / 8;
    const float delta = row_delta(head, token);
    // A query that does not exist gives every key the weight exp(-inf).
    if (team.index % 8 == 0 && token < RESIDENT_TOKENS)
      rows[token] = token < tokens ? QueryRow{head.call.lse[head.statistic(token)] * LOG2_E, delta}
                                   : QueryRow{INFINITY, 0.0f};
  }

  Stripe<W, 1, 0> key_stripe{k.from(stripe), nullptr};
  Stripe<W, 1, HELD, STASHED> value_stripe{v.from(stripe), stash + team.index};
  KeySums<W> sum;
#pragma unroll 1
  for (int query = 0; query < tokens; query += BLOCK) {
    stream.arrive(query);
    __syncthreads();
    if (query == 0) {
      key_stripe.load(lane);
      value_stripe.load(lane);
      // Before dS^T takes the place of V'.
      __syncthreads();
    }
    if (query + BLOCK < tokens) stream.begin(query + BLOCK);
    if (query > 0) store_grad_q(head, query - BLOCK, scores, k, z, scale, warp, staging);
#pragma unroll 1
    for (int row = query; row < query + BLOCK && row < tokens; row += 16) {
      const int column = row % SCORE_COLUMNS;
      Fragment<1> fragment;
      sum.template add<E>(key_stripe, value_stripe, tokens - stripe, stream.queries(), column,
                          rows + row, lane, scale * LOG2_E, fragment);
      // Row lane_row() + 8 has the swizzle of row lane_row(). Computed in every turn: registers are
      // dear.
      const int here = anew(lane_of_warp());
      const int offset = tile_offset<SCORE_COLUMNS>(here / 4, 0) + here % 4 * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        *reinterpret_cast<uint32_t*>(scores.first + (stripe + i % 2 * 8) * SCORE_COLUMNS * 2 +
                                     further<SCORE_COLUMNS>(offset, column + i / 2 * 8)) =
            fragment[0][i];
    }
  }
  __syncthreads();
  store_grad_q(head, (tokens - 1) / BLOCK * BLOCK, scores, k, z, scale, warp, staging);
  // Nobody reads K and dS^T any more, or stages grad_q.
  __syncthreads();
  float* sums = reinterpret_cast<float*>(staging);
  store_keys(head, stripe, sum, k.from(stripe), v.from(stripe), z, scale, sums + warp * W);
  add_mask_sums<W>(head, sums, warps, head.place.image, false);
}

// One warp for every 16 tokens. Blocks are heads, slowest, and images.
template <typename E>
__global__ void __launch_bounds__(512, 1)
    ragged_attention_backward_resident_kernel(const __grid_constant__ BackwardArguments<E> call,
                                              const __grid_constant__ HeadTable table) {
  const int image = int(blockIdx.x) % call.batch;
  const int slot = int(blockIdx.x) / call.batch, width = table.heads[slot].width;
  if (width == 0) return;
  const Place& place = place_block(slot, image, 0);
  with_width<64>(width, [&](auto padded_width) {
    const BackwardHead<E> head{call, table, place};
    resident_head<E, decltype(padded_width)::value>(head, call.scale);
  });
}

template <typename E>
void launch_resident(const RaggedAttentionBackward& call, const Gpu& gpu) {
  const BackwardArguments<E> arguments = backward_arguments<E>(call);
  for (const HeadTable& table : head_tables(call.shape))
    launch("ragged_attention_backward_resident_kernel",
           ragged_attention_backward_resident_kernel<E>,
           Grid{int64_t(table.count) * arguments.batch, (arguments.tokens + 15) / 16 * 32,
                resident_bytes(table.heads[0].width, arguments.tokens)},
           gpu, backward_description(arguments, table), arguments, table);
}

}  // namespace vitslim
