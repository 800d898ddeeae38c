// The tile of `tree`: 32 query rows of one head, which share a choice of clusters (docs/math.md, "tree").
#pragma once

#include "blocked_exact.h"
#include "tree_select.h"
#include "tree_summary.h"

namespace qexport {
namespace QEXPORT_ISA {

// log2 of the number of keys of a cluster.
constexpr float kLog2Count[kBlockKeys + 1] = {-kInf,       0.0f,        1.0f,        1.58496250f, 2.0f,        2.32192809f,
                                              2.58496250f, 2.80735492f, 3.0f,        3.16992500f, 3.32192809f, 3.45943162f,
                                              3.58496250f, 3.70043972f, 3.80735492f, 3.90689060f, 4.0f};

struct TreeScratch {
  BlockedScratch exact;
  float *q, *q_summary, *q_square;  // (head_size up to whole blocks, ld)
  float *weight, *model, *tail;     // (clusters, ld)
  float *score, *draw;              // (clusters)
  int32_t *list, *every;            // (clusters), (every_block): 0, 1, 2, ...
  uint8_t *chosen, *done;           // (clusters)
  float *slope, *trial, *half[2];   // (v_head_size up to whole blocks, ld)
  float *sampled_mean, *row;        // (kHalfSample + 1, packed_row(v_head_size)), (packed_row(v_head_size))
};

// Length of `every`: blocks of summaries, and of a slope.
static int64_t every_block(const AttentionJob& job) {
  return greater(job.tree.clusters, packed_row(job.params.head_size)) / kBlockKeys + 1;
}

static TreeScratch tree_scratch(const AttentionJob& job, Arena& arena) {
  const int64_t clusters = job.tree.clusters, size = packed_row(job.params.head_size), dv = job.params.v_head_size;
  TreeScratch s;
  s.exact = blocked_scratch(job, arena);
  for (float** p : {&s.q, &s.q_summary, &s.q_square}) *p = arena.take<float>(size * kTreeRows);
  for (float** p : {&s.weight, &s.model, &s.tail}) *p = arena.take<float>(clusters * kTreeRows);
  for (float** p : {&s.score, &s.draw}) *p = arena.take<float>(clusters);
  s.list = arena.take<int32_t>(clusters);
  s.every = arena.take<int32_t>(every_block(job));
  for (uint8_t** p : {&s.chosen, &s.done}) *p = arena.take<uint8_t>(clusters);
  for (float** p : {&s.slope, &s.trial, &s.half[0], &s.half[1]}) *p = arena.take<float>(packed_row(dv) * kTreeRows);
  s.sampled_mean = arena.take<float>((kHalfSample + 1) * packed_row(dv));
  s.row = arena.take<float>(packed_row(dv));
  return s;
}

// One tile while it is computed. m, l and O of the online softmax are in base 2, as in blocked_softmax.h.
struct Tile {
  Tile(const AttentionJob& job_, const RowBlock& block_) : job(job_), block(block_) {}

  const TileRegisters registers;
  const AttentionJob& job;
  const RowBlock& block;
  Rows rows;
  TreeScratch s;
  int64_t head, local, q_head, place, index, ld;  // place = batch * q_heads + q_head
  int64_t open;                                   // keys before this one are in clusters that all rows attend to
  int64_t candidates, summaries;                  // clusters that may be chosen, and the blocks of summaries that hold them
  alignas(64) float live[kTreeRows];              // 1 in lanes that hold a row, else 0
  alignas(64) float m[kTreeRows], l[kTreeRows], alpha[kTreeRows];
};

// The queries in the form of the blocks, of the summaries, and squared; the slope applied to them.
static void tile_queries(Tile& t) {
  const TreeState& tree = t.job.tree;
  const KvBlocks& blocks = t.job.blocks;
  const int64_t ld = t.ld, size = t.job.params.head_size, whole = packed_row(size);
  pack_queries(t.job, t.block, t.rows, t.job.params.scale * kLog2E, t.s.q, ld);
  for (int64_t i = size * ld; i < whole * ld; i += kLanes) store(t.s.q + i, vf{});
  for (int64_t i = 0; i < whole * ld; i += kLanes) {
    const vf q = load<vf>(t.s.q + i), natural = q * kLn2;
    store(t.s.q_summary + i, q);
    store(t.s.q_square + i, natural * natural);
  }
  for (int64_t i = 0; i < size * ld; i += kLanes) store(t.s.exact.q_t + i, load<vf>(t.s.q + i));
  pack_block_queries(blocks, t.s.exact.q_t, ld, t.rows.vecs, t.s.exact.q_scale);
  pack_block_queries(tree.centroids, t.s.q_summary, ld, t.rows.vecs, nullptr);
  pack_block_queries(tree.spreads, t.s.q_square, ld, t.rows.vecs, nullptr);
  // Rows of q_summary that the slope's last block reads beyond the head.
  const KvBlocks& slopes = tree.slopes;
  const int64_t used = query_elements(tree.centroids), count = whole / kBlockKeys;
  for (int64_t i = used * ld; i < count * value_elements(slopes) * ld; i += kLanes) {
    store(t.s.q_summary + i, vf{});
  }
  for (int64_t i = 0; i < slopes.v_head_size * ld; i += kLanes) store(t.s.slope + i, vf{});
  const int64_t chunk = t.job.params.is_causal ? t.open / kTreeChunk : 0;
  const int64_t start = chunk * slope_blocks(size);
  if (start >= slopes.count) return;  // no keys before the rows
  value_blocks(slopes, slopes.head_values(t.head) + slopes.value_start(start), t.s.every, count, t.s.q_summary, t.s.slope,
               ld, t.rows.vecs, nullptr);
}

// weight: log2 of the weight of each cluster; score: how much is lost, by the model, where only its centroid is taken.
static void tile_scores(Tile& t) {
  const TreeState& tree = t.job.tree;
  const int64_t ld = t.ld, n = t.summaries * kBlockKeys;
  const int32_t* count = tree.count + t.local * tree.clusters;
  const float* spread = tree.value_spread + t.local * tree.clusters;
  float *weight = t.s.weight, *model = t.s.model, *lost = t.s.tail;
  alignas(64) float shares[kTreeRows];
  score_blocks(tree.centroids, tree.centroids.head_keys(t.head), t.s.every, t.summaries, t.s.q_summary, nullptr, weight, ld,
               t.rows.vecs);
  score_blocks(tree.spreads, tree.spreads.head_keys(t.head), t.s.every, t.summaries, t.s.q_square, nullptr, model, ld,
               t.rows.vecs);
  for (int64_t c = 0; c < n; ++c) t.s.draw[c] = kLog2Count[c < t.candidates ? count[c] : 0];
  for (int64_t at = 0; at < ld; at += kLanes) {
    vf highest = splat(-kInf);
    for (int64_t c = 0; c < n; ++c) {
      const vf variance = load<vf>(model + c * ld + at);
      const vf excess = max(variance - 2.0f, vf{});
      const vf damped = min(variance, splat(2.0f)) + excess * reciprocal(1.0f + excess * 0.25f);
      const vf log_weight = load<vf>(weight + c * ld + at) + damped * (0.5f * kLog2E) + t.s.draw[c];
      highest = max(log_weight, highest);
      store(weight + c * ld + at, log_weight);
      // e^variance - 1, the variance of the weights of the cluster; where rounding leaves less than 0, 0 (NaN stays)
      const vf spread_of_weights = exp2(min(variance * kLog2E, splat(30.0f))) - 1.0f;
      store(model + c * ld + at, max(vf{}, spread_of_weights));
    }
    vf total{};
    const vf origin = highest == -kInf ? vf{} : highest;
    for (int64_t c = 0; c < n; ++c) {
      const vf w = exp2(load<vf>(weight + c * ld + at) - origin);
      total += w;
      store(lost + c * ld + at, w * w * load<vf>(model + c * ld + at));
    }
    const vf share = total > 0.0f ? load<vf>(t.live + at) / total : vf{};
    store(shares + at, share * share);
    // Where no key was attended to yet: a first guess of the maximum, of a key of the heaviest cluster.
    const vf m = load<vf>(t.m + at);
    store(t.m + at, m == -kInf && highest > -kInf ? highest - 4.0f : m);
  }
  for (int64_t c = 0; c < n; ++c) {
    vf sum{};
    for (int64_t at = 0; at < ld; at += kLanes) sum += load<vf>(lost + c * ld + at) * load<vf>(shares + at);
    t.s.score[c] = sum_lanes(sum)[0] * spread[c];
  }
}

// O takes in the factor that it waits for.
static void settle(Tile& t) {
  rescale_rows(t.s.exact.o_t, t.ld, t.job.params.v_head_size, t.rows.vecs, t.alpha);
  for (int64_t at = 0; at < t.ld; at += kLanes) store(t.alpha + at, splat(1.0f));
}

// Scores of the places of a cluster that hold no key become -inf.
static void mask_empty(const Tile& t, int32_t cluster, float* scores) {
  for (int64_t place = t.job.tree.count[t.local * t.job.tree.clusters + cluster]; place < kBlockKeys; ++place) {
    for (int64_t at = 0; at < t.ld; at += kLanes) store(scores + place * t.ld + at, splat(-kInf));
  }
}

// Exact attention to the listed clusters.
static void attend_clusters(Tile& t, const int32_t* list, int64_t listed) {
  const KvBlocks& blocks = t.job.blocks;
  const BlockedScratch& s = t.s.exact;
  const float *keys = blocks.head_keys(t.head), *values = blocks.head_values(t.head);
  const int32_t* counts = t.job.tree.count + t.local * t.job.tree.clusters;
  bool moved = true;
  for (int64_t i = 0; i < listed; i += kBlockedTile / kBlockKeys) {
    const int64_t n = lesser(kBlockedTile / kBlockKeys, listed - i);
    bool full = true, later = false;
    for (int64_t j = 0; j < n; ++j) full = full && counts[list[i + j]] == kBlockKeys;
    alignas(64) float next_alpha[kMaxRows];
    if (!full || !exp2_score_blocks(blocks, keys, list + i, n, s.q_t, s.q_scale, t.ld, t.rows.vecs, t.m, t.l, next_alpha,
                                    s.p, later)) {
      score_blocks(blocks, keys, list + i, n, s.q_t, s.q_scale, s.s, t.ld, t.rows.vecs);
      for (int64_t j = 0; j < n; ++j) mask_empty(t, list[i + j], s.s + j * kBlockKeys * t.ld);
      moved = exp2_scores(blocks.precision, s.s, t.ld, n * kBlockKeys, t.rows.vecs, t.m, t.l, t.alpha, s.p);
    }
    value_blocks(blocks, values, list + i, n, s.p, s.o_t, t.ld, t.rows.vecs, moved ? t.alpha : nullptr);
    moved = later;
    for (int64_t r = 0; r < t.ld; r += kLanes) store(t.alpha + r, later ? load<vf>(next_alpha + r) : vf{} + 1.0f);
  }
  settle(t);
}

// Reads exactly the clusters that are among the `budget` of highest score and were not read before.
static void attend_chosen(Tile& t, int64_t budget) {
  choose_largest(t.s.score, t.candidates, budget, t.s.chosen);
  int64_t listed = 0;
  for (int64_t c = 0; c < t.candidates; ++c) {
    if (t.s.chosen[c] && !t.s.done[c]) t.s.list[listed++] = static_cast<int32_t>(c);
    t.s.done[c] = t.s.chosen[c];
  }
  attend_clusters(t, t.s.list, listed);
}

// The other clusters enter as one key each, with the mean value, and with what the slope adds to it.
static void attend_tail(Tile& t) {
  const TreeState& tree = t.job.tree;
  const int64_t ld = t.ld, n = t.summaries * kBlockKeys, dv = t.job.params.v_head_size;
  for (int64_t c = 0; c < n; ++c) {
    const bool out = c >= t.candidates || t.s.chosen[c];
    for (int64_t at = 0; at < ld; at += kLanes)
      store(t.s.tail + c * ld + at, out ? splat(-kInf) : load<vf>(t.s.weight + c * ld + at));
  }
  alignas(64) float before[kTreeRows];
  for (int64_t at = 0; at < ld; at += kLanes) store(before + at, load<vf>(t.l + at));
  const bool moved = exp2_scores(tree.centroids.precision, t.s.tail, ld, n, t.rows.vecs, t.m, t.l, t.alpha, t.s.tail);
  float* o = t.s.exact.o_t;
  value_blocks(tree.centroids, tree.centroids.head_values(t.head), t.s.every, t.summaries, t.s.tail, o, ld, t.rows.vecs,
               moved ? t.alpha : nullptr);
  for (int64_t at = 0; at < ld; at += kLanes) {
    const vf share = max(load<vf>(t.l + at) - load<vf>(before + at) * load<vf>(t.alpha + at), vf{});
    store(t.alpha + at, splat(1.0f));
    for (int64_t x = 0; x < dv; ++x)
      store(o + x * ld + at, load<vf>(o + x * ld + at) + share * load<vf>(t.s.slope + x * ld + at));
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
