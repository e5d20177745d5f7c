// Forward of ragged attention for one head of one image, or for a range of its queries.
//
// Lanes are queries. A block of V * LANES queries is transposed once; then
//   scores  [keys][lanes]  = keys (row panel, numbers broadcast) times queries (lane panel)
//   weights [keys][lanes]  = 2^(exponent * (scores - largest)), in place
//   sums    [width][lanes] = values^T (row panel, numbers broadcast) times weights
// so the softmax of a query runs down a lane, without a horizontal operation, and a ragged width is
// only a loop count. Keys come in blocks: a later block's larger maximum rescales what was summed.

#pragma once

#include "ragged_attention_head.h"

namespace vitslim {
namespace {

// With up to this many keys, the softmax is the exact one of a whole row.
constexpr int64_t KEY_BLOCK = 384;
// Keys whose values are summed in one chain.
constexpr int64_t SUM_BLOCK = 128;

struct ForwardScratch {
  float* keys;            // [tokens][panel_stride]
  float* values;          // [tokens][panel_stride]
  float* rows;            // [MAX_VECS * LANES][panel_stride], queries, later outputs
  float* queries;         // [width][V * LANES]
  float* scores;          // [keys of a block][V * LANES]
  float* sums;            // [width][V * LANES]
  float* largest;         // [V * LANES], the largest raw product so far
  float* total;           // [V * LANES], the sum of the weights so far
  float* lost;            // [V * LANES], what rounding took from total
  float* rescale;         // [V * LANES]
  float* query_factors;   // [columns]
  float* output_factors;  // [columns]

  ForwardScratch(const Head& head, Carver& carver) {
    const int64_t lanes = MAX_VECS * LANES, stride = panel_stride(head.width);
    keys = carver.take(head.tokens * stride);
    values = carver.take(head.tokens * stride);
    rows = carver.take(lanes * stride);
    queries = carver.take(head.width * lanes);
    scores = carver.take((head.tokens < KEY_BLOCK ? head.tokens : KEY_BLOCK) * lanes);
    sums = carver.take(head.width * lanes);
    largest = carver.take(lanes);
    total = carver.take(lanes);
    lost = carver.take(lanes);
    rescale = carver.take(lanes);
    query_factors = carver.take(head.columns);
    output_factors = carver.take(head.columns);
  }
};

// scores = keys times queries; largest = the maximum down each lane.
struct Scores {
  const float* keys;
  int64_t key_stride;
  const float* queries;
  int64_t width;
  float* scores;
  float* largest;

  template <int R, int V>
  INLINE void run(int64_t key) const {
    Vec tile[R][V];
    clear_tile(tile);
    multiply_rows(keys + key * key_stride, key_stride, queries, V * LANES, width, tile);
    store_tile(scores + key * V * LANES, V * LANES, tile);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec highest = load(largest + v * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) highest = max(highest, tile[r][v]);
      store(largest + v * LANES, highest);
    }
  }
};

// total += x, keeping in `lost` what the rounding of the sum took away (Kahan).
INLINE void add_exactly(Vec x, float* total, float* lost) {
  const Vec before = load(total);
  const Vec corrected = sub(x, load(lost));
  const Vec after = add(before, corrected);
  store(lost, sub(sub(after, before), corrected));
  store(total, after);
}

// scores -> weights, in place; total += their sum. Nearly equal weights round to the same side
// again and again, so only a few are added plainly.
template <int V>
void weigh(const Head& head, int64_t keys, const ForwardScratch& s) {
  const Vec exponent = broadcast(head.exponent);
  Vec offset[V];
  // The rounding of this product is common to a query's weights, so the softmax does not see it.
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v)
    offset[v] = mul(broadcast(-head.exponent), load(s.largest + v * LANES));
  const Split chains(keys, 8);
  for (int64_t i = 0; i < chains.pieces; ++i) {
    Vec sum[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[v] = zero();
    for (int64_t key = chains.begin(i); key < chains.begin(i + 1); ++key) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* p = s.scores + (key * V + v) * LANES;
        const Vec weight = exp2(fma(load(p), exponent, offset[v]));
        store(p, weight);
        sum[v] = add(sum[v], weight);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) add_exactly(sum[v], s.total + v * LANES, s.lost + v * LANES);
  }
}

// Each lane of panel [width][V * LANES] times its factor.
template <int V>
void scale_lanes(float* panel, int64_t width, const float* factors) {
  for (int v = 0; v < V; ++v) {
    const Vec factor = load(factors + v * LANES);
    for (int64_t c = 0; c < width; ++c) {
      float* p = panel + (c * V + v) * LANES;
      store(p, mul(load(p), factor));
    }
  }
}

template <int V>
void forward_queries(const RaggedAttentionForward& call, const Head& head, int64_t image,
                     int64_t head_index, int64_t query, int64_t count, const ForwardScratch& s) {
  const DType dtype = call.shape.dtype;
  const int64_t stride = panel_stride(head.width);
  const void* source =
      at(call.qkv,
         image * call.shape.qkv_batch_stride + query * call.shape.qkv_token_stride + head.begin,
         dtype);
  read_panel(source, dtype, call.shape.qkv_token_stride, count, head.width, s.rows);
  to_lanes(s.rows, count, head.width, s.query_factors, V, s.queries);

  for (int v = 0; v < V; ++v) {
    // Not minus infinity: where all keys of the first blocks are, its difference would be NaN.
    store(s.largest + v * LANES, broadcast(-1e37f));
    store(s.total + v * LANES, zero());
    store(s.lost + v * LANES, zero());
  }
  const Split blocks(head.tokens, KEY_BLOCK);
  for (int64_t i = 0; i < blocks.pieces; ++i) {
    const int64_t first = blocks.begin(i), keys = blocks.begin(i + 1) - first;
    for (int v = 0; v < V; ++v) store(s.rescale + v * LANES, load(s.largest + v * LANES));
    run_tiles<V>(
        Scores{s.keys + first * stride, stride, s.queries, head.width, s.scores, s.largest}, keys);
    for (int v = 0; v < V; ++v) {
      float* rescale = s.rescale + v * LANES;
      const Vec rise = sub(load(rescale), load(s.largest + v * LANES));
      store(rescale, exp2(mul(broadcast(head.exponent), rise)));
    }
    if (i > 0) {
      scale_lanes<V>(s.sums, head.width, s.rescale);
      scale_lanes<V>(s.total, 1, s.rescale);
      scale_lanes<V>(s.lost, 1, s.rescale);
    }
    weigh<V>(head, keys, s);
    const Split parts(keys, SUM_BLOCK);
    for (int64_t part = 0; part < parts.pieces; ++part) {
      const int64_t key = parts.begin(part), depth = parts.begin(part + 1) - key;
      run_tiles<V>(ColumnSums{s.values + (first + key) * stride, stride, s.scores + key * V * LANES,
                              depth, i == 0 && part == 0, s.sums},
                   head.width);
    }
  }

  for (int v = 0; v < V; ++v) {
    float* total = s.total + v * LANES;
    store(s.rescale + v * LANES, div(broadcast(1.0f), load(total)));
  }
  scale_lanes<V>(s.sums, head.width, s.rescale);
  to_rows(s.sums, head.width, V, s.rows);
  const int64_t target = (image * head.tokens + query) * head.embed_dim + head.begin;
  write_panel(s.rows, count, head.width, s.output_factors, at(call.out, target, dtype), dtype,
              head.embed_dim);

  if (!call.lse) return;
  float* lse = call.lse + (image * call.shape.heads + head_index) * head.tokens + query;
  const float scale = __builtin_fabsf(call.shape.scale);
  for (int64_t i = 0; i < count; ++i) lse[i] = scale * s.largest[i] + __builtin_logf(s.total[i]);
}

int64_t forward_scratch(const RaggedAttentionShape& shape, int64_t head_index) {
  Carver carver(nullptr);
  ForwardScratch(Head(shape, head_index), carver);
  return carver.used();
}

// Queries begin..end of one head of one image.
void forward_head(const RaggedAttentionForward& call, int64_t image, int64_t head_index,
                  int64_t begin, int64_t end, float* memory) {
  const Head head(call.shape, head_index);
  Carver carver(memory);
  const ForwardScratch s(head, carver);
  fill_factors(head, call.mask, 2, head.sign, s.query_factors);
  fill_factors(head, call.mask, 1, 1.0f, s.output_factors);

  const DType dtype = call.shape.dtype;
  const int64_t token_stride = call.shape.qkv_token_stride;
  const int64_t first = image * call.shape.qkv_batch_stride + head.begin;
  read_panel(at(call.qkv, first + head.embed_dim, dtype), dtype, token_stride, head.tokens,
             head.width, s.keys);
  read_panel(at(call.qkv, first + 2 * head.embed_dim, dtype), dtype, token_stride, head.tokens,
             head.width, s.values);

  const Split blocks(round_up(end - begin, LANES) / LANES, MAX_VECS);
  for (int64_t i = 0; i < blocks.pieces; ++i) {
    const int64_t query = begin + blocks.begin(i) * LANES;
    const int64_t next = begin + blocks.begin(i + 1) * LANES;
    const int64_t count = (next < end ? next : end) - query;
    const int64_t vecs = blocks.begin(i + 1) - blocks.begin(i);
    if (vecs == 1) forward_queries<1>(call, head, image, head_index, query, count, s);
    if (vecs == 2) forward_queries<2>(call, head, image, head_index, query, count, s);
    if constexpr (MAX_VECS >= 4) {
      if (vecs == 3) forward_queries<3>(call, head, image, head_index, query, count, s);
      if (vecs == 4) forward_queries<4>(call, head, image, head_index, query, count, s);
    }
  }
}

}  // namespace
}  // namespace vitslim
