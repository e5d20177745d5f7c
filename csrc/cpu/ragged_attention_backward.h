// Backward of ragged attention for one head of one image.
//
// Lanes are keys: a block of V * LANES keys and values is transposed once, and for blocks of
// queries
//   weights [rows][lanes]       = 2^(exponent * queries keys^T - lse), recomputed
//   grad_scores [rows][lanes]   = weights * (grad_out values^T - delta),  delta = sum(grad_out out)
//   grad_values [width][lanes] += grad_out^T weights
//   grad_keys   [width][lanes] += queries^T grad_scores
//   grad_queries [rows][width] += grad_scores keys                (here the lanes are columns)
// The last is summed over the key blocks in this task's own panel, so no two threads ever add to
// the same number and the result is the same on every run.
//
// The mask z enters through factors of whole columns. With q' = q z, k' = k z, v' = v z and the raw
// sums above, grad_q = scale z^2 raw_q, grad_k = scale z^2 raw_k, grad_v = z raw_v, and
// grad_z = z scale sum(raw_q q + raw_k k) + sum(raw_v v).

#pragma once

#include "ragged_attention_head.h"

namespace vitslim {
namespace {

constexpr int64_t QUERY_BLOCK = 96;

struct BackwardScratch {
  float *queries, *keys, *values, *grad_out;  // [tokens][panel_stride]
  float* grad_queries;                        // [tokens][panel_stride]
  float *key_lanes, *value_lanes;             // [width][V * LANES]
  float *grad_key_lanes, *grad_value_lanes;   // [width][V * LANES]
  float* rows;                                // [MAX_VECS * LANES][panel_stride]
  float *weights, *grad_scores;               // [QUERY_BLOCK][V * LANES]
  float *lse, *delta;                         // [tokens], lse in powers of two
  float *key_factors, *value_factors;         // [columns]
  float* grad_query_factors;                  // [columns], also those of the keys
  float *mask_sums, *value_mask_sums;         // [columns]

  BackwardScratch(const Head& head, Carver& carver) {
    const int64_t lanes = MAX_VECS * LANES, stride = panel_stride(head.width);
    queries = carver.take(head.tokens * stride);
    keys = carver.take(head.tokens * stride);
    values = carver.take(head.tokens * stride);
    grad_out = carver.take(head.tokens * stride);
    grad_queries = carver.take(head.tokens * stride);
    key_lanes = carver.take(head.width * lanes);
    value_lanes = carver.take(head.width * lanes);
    grad_key_lanes = carver.take(head.width * lanes);
    grad_value_lanes = carver.take(head.width * lanes);
    rows = carver.take(lanes * stride);
    weights = carver.take(QUERY_BLOCK * lanes);
    grad_scores = carver.take(QUERY_BLOCK * lanes);
    lse = carver.take(head.tokens);
    delta = carver.take(head.tokens);
    key_factors = carver.take(head.columns);
    value_factors = carver.take(head.columns);
    grad_query_factors = carver.take(head.columns);
    mask_sums = carver.take(head.columns);
    value_mask_sums = carver.take(head.columns);
  }
};

// weights = 2^(exponent * (queries times keys) - lse)
struct Weights {
  const float* queries;
  int64_t query_stride;
  const float* keys;
  int64_t width;
  float exponent;
  const float* lse;
  float* weights;

  template <int R, int V>
  INLINE void run(int64_t query) const {
    Vec tile[R][V];
    clear_tile(tile);
    multiply_rows(queries + query * query_stride, query_stride, keys, V * LANES, width, tile);
    const Vec factor = broadcast(exponent);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec offset = broadcast(-lse[query + r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        store(weights + ((query + r) * V + v) * LANES, exp2(fma(tile[r][v], factor, offset)));
    }
  }
};

// grad_scores = weights * (grad_out times values - delta)
struct GradScores {
  const float* grad_out;
  int64_t grad_out_stride;
  const float* values;
  int64_t width;
  const float* delta;
  const float* weights;
  float* grad_scores;

  template <int R, int V>
  INLINE void run(int64_t query) const {
    Vec tile[R][V];
    clear_tile(tile);
    multiply_rows(grad_out + query * grad_out_stride, grad_out_stride, values, V * LANES, width,
                  tile);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec offset = broadcast(delta[query + r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t i = ((query + r) * V + v) * LANES;
        store(grad_scores + i, mul(load(weights + i), sub(tile[r][v], offset)));
      }
    }
  }
};

// grad_queries [rows][columns] += grad_scores [rows][keys] times keys [keys][columns]
struct GradQueries {
  const float* grad_scores;
  int64_t grad_score_stride;
  const float* keys;
  int64_t depth;
  int64_t stride;  // of keys and grad_queries
  bool start;
  float* grad_queries;

  template <int R, int V>
  INLINE void run(int64_t query) const {
    Vec tile[R][V];
    clear_tile(tile);
    multiply_rows(grad_scores + query * grad_score_stride, grad_score_stride, keys, stride, depth,
                  tile);
    float* target = grad_queries + query * stride;
    if (!start) add_tile(target, stride, tile);
    store_tile(target, stride, tile);
  }
};

inline void add_grad_queries(GradQueries product, int64_t columns, int64_t rows) {
  for (int64_t done = 0; done < columns;) {
    const int64_t left = (columns - done) / LANES;
    const int64_t vecs = left < MAX_VECS ? left : MAX_VECS;
    if (vecs == 1) run_tiles<1>(product, rows);
    if (vecs == 2) run_tiles<2>(product, rows);
    if constexpr (MAX_VECS >= 4) {
      if (vecs == 3) run_tiles<3>(product, rows);
      if (vecs == 4) run_tiles<4>(product, rows);
    }
    done += vecs * LANES;
    product.keys += vecs * LANES;
    product.grad_queries += vecs * LANES;
  }
}

// sums[c] += sum over rows of a * b, both row panels; blocks keep the rounding error small.
inline void add_products(const float* a, const float* b, int64_t rows, const Head& head,
                         float* sums) {
  const int64_t stride = panel_stride(head.width);
  const Split blocks(rows, 64);
  for (int64_t c = 0; c < head.columns; c += LANES) {
    for (int64_t i = 0; i < blocks.pieces; ++i) {
      Vec sum = zero();
      for (int64_t row = blocks.begin(i); row < blocks.begin(i + 1); ++row)
        sum = fma(load(a + row * stride + c), load(b + row * stride + c), sum);
      store(sums + c, add(load(sums + c), sum));
    }
  }
}

// Everything that V * LANES keys take part in.
template <int V>
void backward_keys(const RaggedAttentionBackward& call, const Head& head, int64_t image,
                   int64_t key, int64_t count, const BackwardScratch& s) {
  const int64_t stride = panel_stride(head.width);
  const float* keys = s.keys + key * stride;
  const float* values = s.values + key * stride;
  to_lanes(keys, count, head.width, s.key_factors, V, s.key_lanes);
  to_lanes(values, count, head.width, s.value_factors, V, s.value_lanes);

  const Split blocks(head.tokens, QUERY_BLOCK);
  for (int64_t i = 0; i < blocks.pieces; ++i) {
    const int64_t query = blocks.begin(i), rows = blocks.begin(i + 1) - query;
    const float* queries = s.queries + query * stride;
    const float* grad_out = s.grad_out + query * stride;
    run_tiles<V>(
        Weights{queries, stride, s.key_lanes, head.width, head.exponent, s.lse + query, s.weights},
        rows);
    run_tiles<V>(GradScores{grad_out, stride, s.value_lanes, head.width, s.delta + query, s.weights,
                            s.grad_scores},
                 rows);
    run_tiles<V>(ColumnSums{grad_out, stride, s.weights, rows, i == 0, s.grad_value_lanes},
                 head.width);
    run_tiles<V>(ColumnSums{queries, stride, s.grad_scores, rows, i == 0, s.grad_key_lanes},
                 head.width);
    add_grad_queries(GradQueries{s.grad_scores, V * LANES, keys, count, stride, key == 0,
                                 s.grad_queries + query * stride},
                     head.columns, rows);
  }

  const DType dtype = call.shape.dtype;
  const int64_t row_stride = 3 * head.embed_dim;
  const int64_t target = (image * head.tokens + key) * row_stride + head.begin;
  to_rows(s.grad_key_lanes, head.width, V, s.rows);
  write_panel(s.rows, count, head.width, s.grad_query_factors,
              at(call.grad_qkv, target + head.embed_dim, dtype), dtype, row_stride);
  if (call.mask) add_products(s.rows, keys, count, head, s.mask_sums);
  to_rows(s.grad_value_lanes, head.width, V, s.rows);
  write_panel(s.rows, count, head.width, s.value_factors,
              at(call.grad_qkv, target + 2 * head.embed_dim, dtype), dtype, row_stride);
  if (call.mask) add_products(s.rows, values, count, head, s.value_mask_sums);
}

// The panels of a head and what the queries need: lse in powers of two, and delta.
inline void backward_prepare(const RaggedAttentionBackward& call, const Head& head, int64_t image,
                             int64_t head_index, const BackwardScratch& s) {
  const RaggedAttentionShape& shape = call.shape;
  const DType dtype = shape.dtype;
  const int64_t stride = panel_stride(head.width), tokens = head.tokens;
  const int64_t first = image * shape.qkv_batch_stride + head.begin;
  float* const panels[3] = {s.queries, s.keys, s.values};
  for (int i = 0; i < 3; ++i)
    read_panel(at(call.qkv, first + i * head.embed_dim, dtype), dtype, shape.qkv_token_stride,
               tokens, head.width, panels[i]);
  read_panel(at(call.grad_out, image * call.grad_out_batch_stride + head.begin, dtype), dtype,
             call.grad_out_token_stride, tokens, head.width, s.grad_out);

  // The panel of the gradient of the queries is still free: it holds the output meanwhile.
  float* out = s.grad_queries;
  read_panel(at(call.out, image * tokens * head.embed_dim + head.begin, dtype), dtype,
             head.embed_dim, tokens, head.width, out);
  const float* lse = call.lse + (image * shape.heads + head_index) * tokens;
  for (int64_t i = 0; i < tokens; ++i) {
    Vec sum = zero();
    for (int64_t c = 0; c < head.columns; c += LANES)
      sum = fma(load(out + i * stride + c), load(s.grad_out + i * stride + c), sum);
    s.delta[i] = sum_lanes(sum);
    s.lse[i] = lse[i] * 1.44269504088896341f;
  }
}

int64_t backward_scratch(const RaggedAttentionShape& shape, int64_t head_index) {
  Carver carver(nullptr);
  BackwardScratch(Head(shape, head_index), carver);
  return carver.used();
}

void backward_head(const RaggedAttentionBackward& call, int64_t image, int64_t head_index,
                   float* memory) {
  const Head head(call.shape, head_index);
  if (head.width == 0) return;
  Carver carver(memory);
  const BackwardScratch s(head, carver);
  backward_prepare(call, head, image, head_index, s);
  fill_factors(head, call.mask, 2, head.sign, s.key_factors);
  fill_factors(head, call.mask, 1, 1.0f, s.value_factors);
  fill_factors(head, call.mask, 2, call.shape.scale, s.grad_query_factors);
  for (int64_t c = 0; c < head.columns; ++c) s.mask_sums[c] = s.value_mask_sums[c] = 0.0f;

  const Split blocks(round_up(head.tokens, LANES) / LANES, MAX_VECS);
  for (int64_t i = 0; i < blocks.pieces; ++i) {
    const int64_t key = blocks.begin(i) * LANES, next = blocks.begin(i + 1) * LANES;
    const int64_t count = (next < head.tokens ? next : head.tokens) - key;
    const int64_t vecs = blocks.begin(i + 1) - blocks.begin(i);
    if (vecs == 1) backward_keys<1>(call, head, image, key, count, s);
    if (vecs == 2) backward_keys<2>(call, head, image, key, count, s);
    if constexpr (MAX_VECS >= 4) {
      if (vecs == 3) backward_keys<3>(call, head, image, key, count, s);
      if (vecs == 4) backward_keys<4>(call, head, image, key, count, s);
    }
  }

  const int64_t row_stride = 3 * head.embed_dim;
  write_panel(s.grad_queries, head.tokens, head.width, s.grad_query_factors,
              at(call.grad_qkv, image * head.tokens * row_stride + head.begin, call.shape.dtype),
              call.shape.dtype, row_stride);
  if (!call.mask) return;
  add_products(s.grad_queries, s.queries, head.tokens, head, s.mask_sums);
  float* grad_mask = call.grad_mask + image * head.embed_dim + head.begin;
  for (int64_t c = 0; c < head.width; ++c)
    grad_mask[c] =
        call.mask[head.begin + c] * call.shape.scale * s.mask_sums[c] + s.value_mask_sums[c];
}

}  // namespace
}  // namespace vitslim
