// Reading the keys of single clusters in decoding with strategy tree: rows that lie scattered over the cache.
#pragma once

#include "few_rows.h"
#include "summarise.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int64_t kGatherKeys = 1024;      // keys of clusters that are worked on at once
constexpr int64_t kResidualClusters = 16;  // drawn per row: decode_residual.h

struct DecodeScratch {
  FewScratch few;          // its state: sums over the keys that were read
  FewState whole;          // the same and the means of all other clusters; then the output
  float *weight, *gain;    // (rows, clusters): log weights; (what a cluster's means get wrong)^2 up to a factor of the row
  float* tail;             // (rows, clusters): weights of the clusters that are not read, in units of exp(whole.m)
  uint8_t *chosen, *read;  // (rows, clusters): to be read; read already
  int32_t* keys;           // (kGatherKeys)
  float *size, *cluster, *residual;  // (clusters) that drawing is in proportion to; (v_head_size) of one cluster, and of all
  char* summary;                     // memory of update_summary
};

static DecodeScratch decode_scratch(const AttentionJob& job, Arena& arena) {
  const int64_t clusters = summary_chunks(job.total_len) * kChunkClusters;
  DecodeScratch s;
  s.few = few_scratch(job, arena);
  s.whole = few_state(job, arena);
  s.weight = arena.take<float>(kFewRows * clusters);
  s.gain = arena.take<float>(kFewRows * clusters);
  s.tail = arena.take<float>(kFewRows * clusters);
  s.chosen = arena.take<uint8_t>(kFewRows * clusters);
  s.read = arena.take<uint8_t>(kFewRows * clusters);
  s.keys = arena.take<int32_t>(kGatherKeys);
  s.size = arena.take<float>(clusters);
  s.cluster = arena.take<float>(packed_row(job.params.v_head_size));
  s.residual = arena.take<float>(packed_row(job.params.v_head_size));
  s.summary = arena.take<char>(static_cast<int64_t>(summary_bytes(job)));
  return s;
}

// The chunks [first, end) of one kv head, all of whose keys every row attends to.
struct Chunks {
  HeadSummary summary;
  int64_t first, end;
  int64_t first_cluster() const { return first * kChunkClusters; }
  int64_t clusters() const { return (end - first) * kChunkClusters; }
  int64_t begin_key() const { return kSinkKeys + first * kChunkKeys; }
  int64_t end_key() const { return kSinkKeys + end * kChunkKeys; }
};

// Writes the keys of cluster c to list[0 .. kClusterKeys).
static void list_cluster(const Chunks& chunks, int64_t c, int32_t* list) {
  const int64_t chunk = chunks.first + c / kChunkClusters;
  const float* members = chunks.summary.members + (chunks.first_cluster() + c) * kClusterKeys;
  for (int64_t i = 0; i < kClusterKeys; ++i) {
    // The state comes from outside: whatever it holds, no key beyond the chunk is read.
    const int32_t place = static_cast<int32_t>(members[i]) & static_cast<int32_t>(kChunkKeys - 1);
    list[i] = static_cast<int32_t>(kSinkKeys + chunk * kChunkKeys) + place;
  }
}

// s.few.s = scores of row r against the `count` keys of s.keys, whole clusters of them; returns the largest.
static float gathered_scores(const AttentionJob& job, const KeyRun& k, const KeyRun& v, const DecodeScratch& s, int64_t r,
                             int64_t count) {
  const QuantumAttentionParams& p = job.params;
  const FewProducts products = few_products(p.type, 1);
  const int64_t k_bytes = p.head_size * element_size(p.type), v_bytes = p.v_head_size * element_size(p.type);
  const float* q = s.few.q + r * packed_row(p.head_size);
  const auto ahead = [&](const KeyRun& run, int64_t j, int64_t n, int64_t bytes) QEXPORT_INLINE_LAMBDA {
    for (const int64_t end = lesser(j + n, count); j < end; ++j) {
      const char* row = run.data + s.keys[j] * run.step;
      for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(row + line, 0, 2);
    }
  };
  // Scattered rows come at the latency of the memory unless many are under way: more than the first-level cache can wait
  // for.
  constexpr int64_t kAhead = 4 * kClusterKeys;
  ahead(k, 0, kAhead, k_bytes);
  vf highest = splat(-kInf);
  for (int64_t j = 0; j < count; j += kLanes) {
    const char* row[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) row[i] = k.data + s.keys[j + i] * k.step;
    ahead(k, j + kAhead, kLanes, k_bytes);
    ahead(v, j, kLanes, v_bytes);
    products.score(q, row, p.head_size, s.few.s + j);
    vf x = load<vf>(s.few.s + j);
    if (p.softcap > 0.0f) x = tanh(x * (1.0f / p.softcap)) * p.softcap;
    store(s.few.s + j, x);
    highest = max(x, highest);
  }
  return largest_lane(highest);
}

// The values of the keys that s.keys lists from j on, one cluster.
static QEXPORT_INLINE ListedRows cluster_values(const DecodeScratch& s, const KeyRun& v, int64_t j) {
  return {{v.data, v.step, kClusterKeys, v.type}, s.keys + j};
}

// Adds the `count` keys of s.keys to the state of row r.
static void gathered_keys(const AttentionJob& job, const RowBlock& block, const DecodeScratch& s, int64_t r, int64_t count) {
  const QuantumAttentionParams& p = job.params;
  const FewState& state = s.few.state;
  const KeyRun k = key_run(job, false, block.batch, block.kv_head, 0, count);
  const KeyRun v = key_run(job, true, block.batch, block.kv_head, 0, count);
  const float highest = gathered_scores(job, k, v, s, r, count);
  float alpha = few_softmax(s.few.s, count, highest, state.m[r], state.l[r]);
  float* o = state.o + r * packed_row(p.v_head_size);
  for (int64_t j = 0; j < count; j += kClusterKeys, alpha = 1.0f) {
    few_products(p.type, 1).values(s.few.s + j, 0, cluster_values(s, v, j), p.v_head_size, &alpha, o, 0);
  }
}

// Adds the clusters that are chosen for row r and not read yet.
static void read_chosen(const AttentionJob& job, const RowBlock& block, const Chunks& chunks, const DecodeScratch& s,
                        int64_t r) {
  const uint8_t* chosen = s.chosen + r * chunks.clusters();
  uint8_t* read = s.read + r * chunks.clusters();
  int64_t count = 0;
  for (int64_t c = 0; c < chunks.clusters(); ++c) {
    if (!chosen[c] || read[c]) continue;
    read[c] = 1;
    list_cluster(chunks, c, s.keys + count);
    count += kClusterKeys;
    if (count == kGatherKeys) gathered_keys(job, block, s, r, count), count = 0;
  }
  if (count > 0) gathered_keys(job, block, s, r, count);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
