// What the driver runs of `tree`: a tile, a probe that settles a budget, an audit that measures the error.
#pragma once

#include "tree_residual.h"

namespace qexport {
namespace QEXPORT_ISA {

// The rows of one query head that a block begins with, or those of `queries`.
static void start_tile(Tile& t, int64_t index, char* memory, const int64_t* queries = nullptr) {
  const AttentionJob& job = t.job;
  const QuantumAttentionParams& p = job.params;
  set_rows(job, t.block, t.rows, queries);
  Arena arena{memory, 0};
  t.s = tree_scratch(job, arena);
  t.ld = t.rows.vecs * kLanes;
  t.head = t.block.batch * p.kv_heads + t.block.kv_head;
  t.local = t.head - job.blocks.first_head;
  t.q_head = t.rows.head[0];
  t.place = t.block.batch * p.q_heads + t.q_head;
  t.index = index;
  for (int64_t r = 0; r < t.ld; ++r) t.live[r] = r < t.rows.count && t.rows.hi[r] > t.rows.lo[r] ? 1.0f : 0.0f;
  for (int64_t i = 0; i < every_block(job); ++i) t.s.every[i] = static_cast<int32_t>(i);
  // Chunks before that of the first row are open to all rows of the tile; the keys from there on are read as they come.
  const int64_t* nonpad = job.tensors.nonpad_kv_seqlen;
  const int64_t position = t.rows.query[0] + (nonpad ? given_len(t.job, t.block.batch) - p.q_len : p.past_len);
  t.open = p.is_causal ? greater<int64_t>(position, 0) / kTreeChunk * kTreeChunk : job.blocks.count * kBlockKeys;
  t.candidates = lesser(t.open / kBlockKeys, job.blocks.count);
  t.summaries = (t.candidates + kBlockKeys - 1) / kBlockKeys;
  tile_queries(t);
}

// Nothing attended to yet but, under a causal mask, the keys from the chunk of the first row on.
static void start_attention(Tile& t) {
  for (int64_t c = 0; c < t.job.tree.clusters; ++c) t.s.done[c] = 0, t.s.chosen[c] = 0;
  start_rows(t.job.blocks, t.ld, t.s.exact.o_t, t.m, t.l, t.alpha);
  if (t.job.params.is_causal) blocked_range(t.job, t.job.tree.natural, t.head, t.rows, t.s.exact, t.open, t.m, t.l, t.alpha);
  settle(t);
}

static void attend_rest(Tile& t) {
  int64_t rest = 0;
  for (int64_t c = 0; c < t.candidates; ++c) {
    if (!t.s.done[c]) t.s.list[rest++] = static_cast<int32_t>(c);
  }
  attend_clusters(t, t.s.list, rest);
}

// The tail and its correction.
static void attend_estimate(Tile& t) {
  const Residual residual = t.job.params.residual;
  attend_tail(t);
  if (residual == Residual::unbiased || residual == Residual::james_stein) correct_tail(t);
}

// y[x][lane] = O / l, 0 in lanes without a row.
static void normalised_output(const Tile& t, float* y) {
  for (int64_t at = 0; at < t.ld; at += kLanes) {
    const vf l = load<vf>(t.l + at), inverse = l > 0.0f ? load<vf>(t.live + at) / l : vf{};
    for (int64_t i = at; i < t.job.params.v_head_size * t.ld; i += t.ld) store(y + i, load<vf>(t.s.exact.o_t + i) * inverse);
  }
}

// |a - b|^2, or |a|^2 where b is null.
static double squared_distance(const Tile& t, const float* a, const float* b) {
  vf sum{};
  for (int64_t i = 0; i < t.job.params.v_head_size * t.ld; i += kLanes) {
    const vf x = load<vf>(a + i) - (b ? load<vf>(b + i) : vf{});
    sum += x * x;
  }
  return static_cast<double>(sum_lanes(sum)[0]);
}

static int64_t tile_budget(const Tile& t) {
  const TreeState& tree = t.job.tree;
  const int64_t budget = tree.budget[t.place];
  if (!(tree.threshold[t.place] > 0.0f)) return budget;
  int64_t reached = 0;
  for (int64_t c = 0; c < t.candidates; ++c) reached += t.s.score[c] >= tree.threshold[t.place];
  return greater(least_shared(budget), lesser(reached, most_shared(budget)));
}

static void tree_block(const AttentionJob& job, RowBlock block, int64_t index, char* memory) {
  Tile t(job, block);
  start_tile(t, index, memory);
  start_attention(t);
  if (job.tree.budget[t.place] < t.candidates) {
    tile_scores(t);
    const int64_t budget = tile_budget(t);
    if (budget < t.candidates) {
      attend_chosen(t, budget);
      attend_estimate(t);
      return finish_rows(job, block, t.rows, t.s.exact.o_t, t.m, t.l, t.alpha);
    }
  }
  attend_rest(t);
  finish_rows(job, block, t.rows, t.s.exact.o_t, t.m, t.l, t.alpha);
}

// The scores of a tile, and the squared norm of the output that centroids alone give.
static void tree_probe(const AttentionJob& job, RowBlock block, int64_t probe, int64_t index, char* memory) {
  Tile t(job, block);
  start_tile(t, index, memory);
  start_attention(t);
  tile_scores(t);
  const TreeState& tree = job.tree;
  float* score = tree.probe_score + (t.place * kProbes + probe) * tree.clusters;
  for (int64_t c = 0; c < tree.clusters; ++c) score[c] = c < t.candidates ? t.s.score[c] : 0.0f;
  attend_tail(t);
  normalised_output(t, t.s.half[0]);
  tree.probe_norm[t.place * kProbes + probe] = static_cast<float>(squared_distance(t, t.s.half[0], nullptr));
}

// kernels.h
static bool tree_trial(const AttentionJob& job, RowBlock block, int64_t index, int64_t doublings, double limit,
                       double* error, double* norm, char* memory) {
  Tile t(job, block);
  start_tile(t, index, memory);
  start_attention(t);
  attend_rest(t);
  float *exact = t.s.trial, *found = t.s.half[0];
  normalised_output(t, exact);
  *norm += squared_distance(t, exact, nullptr);
  for (int64_t i = doublings - 1; i >= 0; --i) {  // the largest first: most heads that fail it fail early
    const int64_t budget = int64_t{job.tree.budget[t.place]} << i;
    if (budget < t.candidates) {
      start_attention(t);
      tile_scores(t);
      attend_chosen(t, budget);
      attend_estimate(t);
      normalised_output(t, found);
      error[i] += squared_distance(t, found, exact);
    }
    if (i == doublings - 1 && !(error[i] <= limit * *norm)) return false;
  }
  return true;
}

// Squared error and squared norm of Y over some rows of a head, which are computed exactly: added to sums[0], sums[1].
static void tree_audit(const AttentionJob& job, RowBlock block, const int64_t* queries, double* sums, char* memory) {
  const QuantumAttentionParams& p = job.params;
  Tile t(job, block);
  start_tile(t, 0, memory, queries);
  start_attention(t);
  attend_rest(t);
  normalised_output(t, t.s.half[0]);
  float* y = t.s.half[1];
  const int64_t whole = packed_row(p.v_head_size);
  for (int64_t r = 0; r < t.ld; ++r) {
    if (r < t.rows.count) {
      read_row(p.type, output_row(job, block.batch, t.q_head, t.rows.query[r]), p.v_head_size, t.s.row);
    } else {
      for (int64_t x = 0; x < whole; ++x) t.s.row[x] = 0.0f;
    }
    for (int64_t x = 0; x < p.v_head_size; ++x) y[x * t.ld + r] = t.s.row[x] * t.live[r];
  }
  sums[0] += squared_distance(t, y, t.s.half[0]);
  sums[1] += squared_distance(t, t.s.half[0], nullptr);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
