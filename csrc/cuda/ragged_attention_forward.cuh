// The device code of ragged_attention's forward.
//
//   S = scale * (q z^2) k^T,   P = softmax(S),   out = (P v) z,   lse = log(sum(exp(S)))
//
// which is the same as masking q, k and v: so k and v come in as they are, and the mask z touches
// only what every warp holds of its own queries.
//
// A block works on one head of one image. A warp owns stripes of 16 queries; all its warps share
// the keys and values, which lie in shared memory in tiles of TILE rows:
//
//   work    what the block does
//   keys    [rows, W] in PARTS planes    tile t in the rows from TILE * slot on
//   values  [rows, W] in PARTS planes    likewise
//   queries [warps, 16, W] in PARTS planes, a stripe of each warp; its result leaves through them
//
// Up to 256 tokens stay there, if there is room: they are loaded once, and a warp's second stripe
// reads them again. Of more tokens a ring of tiles holds a part, and the next tile arrives while
// one is in use. The softmax is taken as it comes, a tile at a time, so that the scores never leave
// the registers.

#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "heads.cuh"

namespace vitslim {

constexpr int STRIPE = 16;     // queries of a warp
constexpr int MOST_WARPS = 8;  // of a block

// Keys that are loaded and multiplied together: as many as registers have room for their scores,
// and shared memory of 99 KiB for two such tiles of float32 in parts.
template <int WIDEST, int PARTS>
constexpr int KEY_TILE = PARTS == 1                 ? 64
                         : PARTS > 2 && WIDEST > 64 ? 16
                                                    : 32;

// How the work is cut into blocks, and shared memory into tiles.
struct ForwardPlan {
  int group;   // stripes of a block
  int groups;  // blocks of a head of an image
  int images;  // whose blocks come one after the other for every head, see block_work
  int rows;    // of keys in shared memory
  // Tile t lies in slot t & last_slot: a ring of a power of two, or as many slots as come.
  int last_slot;
  int ahead;  // tiles on their way before the first is used: all of them, or one less than a ring
};

template <typename E>
struct ForwardTask {
  const E* qkv;       // [batch, tokens, 3 * D] by its strides
  const float* mask;  // [D], or null
  E* out;             // [batch, tokens, D]
  float* lse;         // [batch, heads, tokens], or null
  int64_t qkv_batch_stride, qkv_token_stride;
  int batch, tokens, heads;
  // scale = sign * size, with a sign of 0 for a scale of 0: scores that are multiplied by a
  // positive number alone keep their order, and those beyond the last key stay -inf.
  float sign;
  float exponent;  // size * log2(e)
  bool qkv_aligned, out_aligned;
  ForwardPlan plan;
};

// What a block does. It lies at the start of shared memory and is read there whenever it is needed:
// the products leave no registers for it.
struct BlockWork {
  Head head;
  int image;
  int first_stripe, end_stripe;
};
constexpr int WORK_BYTES = 32;
static_assert(sizeof(BlockWork) <= WORK_BYTES);

// The queries of a stripe as left operands. Where there is room they stay in registers, else they
// are read from shared memory whenever a product needs them: with 64 columns, results and scores
// take 64 of the 128 registers that let two blocks share a multiprocessor.
template <typename E, int W, int PARTS>
struct Queries {
  static constexpr bool IN_REGISTERS = PARTS == 1 && W != 64;

  Tile<W, PARTS> tile;
  Fragment<PARTS> fragments[IN_REGISTERS ? W / 16 : 1];

  // With what the mask, on either side of the product, and the sign of the scale make of them.
  __device__ void load(const Rows<const E>& source, const float* mask, float sign) {
    fill_scaled(tile, source, STRIPE, warp_team(),
                [=](int column) { return mask ? sign * mask[column] * mask[column] : sign; });
    __syncwarp();
    if constexpr (IN_REGISTERS) {
#pragma unroll
      for (int k = 0; k < W / 16; ++k) load_a(fragments[k], tile, 0, k * 16);
    }
  }

  __device__ const Fragment<PARTS>& at(int k) {
    if constexpr (IN_REGISTERS) return fragments[k];
    load_a(fragments[0], tile, 0, k * 16);
    return fragments[0];
  }
};

// The softmax of a stripe as far as its keys have been seen, in powers of two. A lane has two rows
// of it, lane / 4 and the eighth after that, and a quarter of each sum.
template <int W>
struct Running {
  float result[W / 8][4];  // sum of 2^(score - base) times v
  float peak[2];           // the largest score
  float sum[2];            // of 2^(score - base)

  __device__ void start() {
#pragma unroll
    for (int n = 0; n < W / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) result[n][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2; ++i) peak[i] = -INFINITY, sum[i] = 0.0f;
  }

  // What is subtracted from scores. An infinite one would make NaN of every score like it; so 2^inf
  // makes a sum of inf, and a row of -inf alone a sum of 0.
  static __device__ float base(float peak) { return fabsf(peak) == INFINITY ? 0.0f : peak; }

  // Turns products of q and k into 2^(score - base).
  template <int KEYS>
  __device__ void add(float (&scores)[KEYS / 8][4], float exponent) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
        largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      const float before = peak[half];
      peak[half] = fmaxf(before, row_max(largest) * exponent);
      const float subtracted = base(peak[half]);
      const float fade = before == peak[half] ? 1.0f : exp2_fast(before - subtracted);
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[n][i] = exp2_fast(fmaf(scores[n][i], exponent, -subtracted));
          added += scores[n][i];
        }
      sum[half] = fmaf(sum[half], fade, added);
#pragma unroll
      for (int n = 0; n < W / 8; ++n) {
        result[n][2 * half] *= fade;
        result[n][2 * half + 1] *= fade;
      }
    }
  }
};

// Takes in KEYS keys, of which the first `known` are there.
template <int KEYS, typename E, int W, int PARTS>
__device__ inline void attend(Running<W>& running, Queries<E, W, PARTS>& queries,
                              const Tile<W, PARTS>& keys, const Tile<W, PARTS>& values, int known,
                              float exponent) {
  using T = Operand<E>;
  float scores[KEYS / 8][4] = {};
  Fragment<PARTS> right;
#pragma unroll
  for (int k = 0; k < W / 16; ++k) {
    const Fragment<PARTS>& left = queries.at(k);
#pragma unroll
    for (int n = 0; n < KEYS / 16; ++n) {
      load_b(right, keys, n * 16, k * 16);
      multiply<T, PARTS>(scores[2 * n], scores[2 * n + 1], left, right);
    }
  }
  if (known < KEYS) {
    const int limit = known - lane_column();
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (n * 8 + i % 2 >= limit) scores[n][i] = -INFINITY;
  }
  running.template add<KEYS>(scores, exponent);
#pragma unroll
  for (int k = 0; k < KEYS / 16; ++k) {
    Fragment<PARTS> left;
    operand_of<T, PARTS>(left, scores[2 * k], scores[2 * k + 1]);
#pragma unroll
    for (int n = 0; n < W / 16; ++n) {
      load_b_transposed(right, values, k * 16, n * 16);
      multiply<T, PARTS>(running.result[2 * n], running.result[2 * n + 1], left, right);
    }
  }
}

// Writes a stripe's rows of out and of lse, which starts at the stripe's first query or is null.
template <typename E, int W>
__device__ inline void finish(Running<W>& running, const Rows<E>& out, const float* mask,
                              float* lse, unsigned char* staging) {
  constexpr float LN_2 = 0.693147180559945f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane_row() + half * 8;
    const float sum = row_sum(running.sum[half]);
    if (lse && lane_column() == 0 && row < out.count)
      lse[row] = (Running<W>::base(running.peak[half]) + log2f(sum)) * LN_2;
    const float inverse = reciprocal_fast(sum);
#pragma unroll
    for (int n = 0; n < W / 8; ++n) {
      running.result[n][2 * half] *= inverse;
      running.result[n][2 * half + 1] *= inverse;
    }
  }
  if (mask) {
    const float* const from = mask + lane_column();
    const int limit = out.width - lane_column();
#pragma unroll
    for (int n = 0; n < W / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float z = n * 8 + i < limit ? from[n * 8 + i] : 0.0f;
        running.result[n][i] *= z;
        running.result[n][i + 2] *= z;
      }
  }
  store_rows<W>(out, running.result, staging);
}

// Waits until at most `pending` groups of this thread's copies are unfinished.
__device__ inline void wait_for_copies(int pending) {
  switch (pending) {
    case 0:
      return copy_async_wait<0>();
    case 1:
      return copy_async_wait<1>();
    case 2:
      return copy_async_wait<2>();
    default:
      return copy_async_wait<3>();
  }
}

// The stripes of a block.
template <int W, int PARTS, int TILE, typename E>
__device__ inline void attend_head(const ForwardTask<E>& task, int columns, const BlockWork& work) {
  const ForwardPlan& plan = task.plan;
  const int tokens = task.tokens, tiles = (tokens + TILE - 1) / TILE;
  const int warp = int(threadIdx.x / 32), warps = int(blockDim.x / 32);

  constexpr auto BYTES = &Tile<W, PARTS>::bytes;
  const Tile<W, PARTS> keys{shared_memory() + WORK_BYTES, plan.rows};
  const Tile<W, PARTS> values{keys.first + BYTES(plan.rows), plan.rows};
  Queries<E, W, PARTS> queries;
  queries.tile = {values.first + BYTES(plan.rows) + warp * BYTES(STRIPE), STRIPE};

  // A head without columns has no address that may be copied from.
  const auto on_unit = [&] {
    return work.head.offset % (16 / int(sizeof(E))) == 0 && work.head.width > 0;
  };
  // The rows of q, k or v, part 0, 1 or 2, from a token on.
  const auto rows_of = [&](int part, int token) {
    const int64_t row = work.image * task.qkv_batch_stride + token * task.qkv_token_stride;
    return Rows<const E>{task.qkv + row + part * int64_t(columns) + work.head.offset,
                         task.qkv_token_stride, tokens - token, work.head.width,
                         task.qkv_aligned && on_unit()};
  };
  const auto mask = [&] { return task.mask ? task.mask + work.head.offset : nullptr; };

  // One group of copies for every tile, an empty one for a tile that is not there, so that the
  // number of groups to wait for is always the same.
  const auto start_tile = [&](int tile) {
    if (tile < tiles) {
      const int from = tile * TILE, to = (tile & plan.last_slot) * TILE;
      const int left = (tokens - from + 15) / 16 * 16, count = left < TILE ? left : TILE;
#pragma unroll 1
      for (int part = 1; part < 3; ++part)
        fill((part == 1 ? keys : values).from(to), rows_of(part, from), count, block_team());
    }
    copy_async_commit();
  };

  bool first_round = true;
  for (int stripe = work.first_stripe + warp; first_round || stripe < work.end_stripe;
       stripe += warps) {
    const int query = stripe * STRIPE;
    const bool busy = stripe < work.end_stripe;
    Running<W> running;
    // The first round begins before the first tile, with the tiles that are to be on their way.
    for (int tile = first_round ? -plan.ahead : 0; tile < tiles; ++tile) {
      if (tile == 0 && busy) {
        queries.load(rows_of(0, query), mask(), task.sign);
        running.start();
      }
      if (first_round) {
        if (tile >= 0) {
          // When all threads are here this tile is complete, and the one before it done with.
          wait_for_copies(plan.ahead - 1);
          __syncthreads();
        }
        start_tile(tile + plan.ahead);
      }
      if (tile < 0 || !busy) continue;
      const int slot = (tile & plan.last_slot) * TILE, known = tokens - tile * TILE;
      if (known > TILE - 16) {
        attend<TILE>(running, queries, keys.from(slot), values.from(slot), known, task.exponent);
      } else {
        for (int row = 0; row < known; row += 16)
          attend<16>(running, queries, keys.from(slot + row), values.from(slot + row), known - row,
                     task.exponent);
      }
    }
    first_round = false;
    if (!busy) continue;
    const Rows<E> out{
        task.out + (int64_t(work.image) * tokens + query) * columns + work.head.offset, columns,
        tokens - query, work.head.width, task.out_aligned && on_unit()};
    const int64_t lse_row = int64_t(work.image) * task.heads + work.head.index;
    finish(running, out, mask(), task.lse ? task.lse + lse_row * tokens + query : nullptr,
           queries.tile.first);
  }
}

// Blocks are numbered by images that fit into the second-level cache together, then by heads, the
// widest first, then by these images, then by groups of stripes. Neighbouring heads share memory
// sectors at their edges, and those are still cached when the next head is read; and the last
// blocks of the launch are short ones.
template <typename E>
__device__ inline BlockWork block_work(const ForwardTask<E>& task, const HeadTable& table) {
  const ForwardPlan& plan = task.plan;
  const int block = int(blockIdx.x), blocks_of_image = table.count * plan.groups;
  // The number of blocks fits an int, but not that of a whole set of images.
  const int first_image = int(block / (int64_t(plan.images) * blocks_of_image)) * plan.images;
  const int left = task.batch - first_image, images = plan.images < left ? plan.images : left;
  const int of_set = block - first_image * blocks_of_image;
  const int of_head = of_set % (images * plan.groups);
  const int first_stripe = of_head % plan.groups * plan.group;
  const int stripes = (task.tokens + STRIPE - 1) / STRIPE, end = first_stripe + plan.group;
  return {table.heads[of_set / (images * plan.groups)], first_image + of_head / plan.groups,
          first_stripe, end < stripes ? end : stripes};
}

template <typename E, int WIDEST, int PARTS>
__global__ void __launch_bounds__(MOST_WARPS * 32, PARTS == 1 && WIDEST <= 64 ? 2 : 1)
    ragged_attention_forward_kernel(const __grid_constant__ ForwardTask<E> task,
                                    const __grid_constant__ HeadTable table) {
  BlockWork& work = *reinterpret_cast<BlockWork*>(shared_memory());
  if (threadIdx.x == 0) work = block_work(task, table);
  __syncthreads();
  with_width<WIDEST>(work.head.width, [&](auto width) {
    attend_head<decltype(width)::value, PARTS, KEY_TILE<WIDEST, PARTS>>(task, table.columns, work);
  });
}

}  // namespace vitslim
