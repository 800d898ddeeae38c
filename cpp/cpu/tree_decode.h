// Decoding with strategy tree from a key_summary (docs/math.md): the mean keys of all clusters are scored, the clusters that
// matter most to a query are read exactly, the others enter by their means. Chunks that are not full, and the first keys,
// are always read. A step reads a tenth of the cache.
#pragma once

#include "few_rows.h"
#include "summarise.h"
#include "tree_select.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int64_t kGatherKeys = 1024;  // keys of chosen clusters that are worked on at once

struct DecodeScratch {
  FewScratch few;
  float *weight, *gain;  // (rows, clusters): log weights, then weights; (clusters): what a cluster's means get wrong
  uint8_t* chosen;       // (rows, clusters)
  int32_t* keys;         // (kGatherKeys)
  char* summary;         // memory of update_summary
};

static DecodeScratch decode_scratch(const AttentionJob& job, Arena& arena) {
  const int64_t clusters = summary_chunks(job.total_len) * kChunkClusters;
  DecodeScratch s;
  s.few = few_scratch(job, arena);
  s.weight = arena.take<float>(kFewRows * clusters);
  s.gain = arena.take<float>(clusters);
  s.chosen = arena.take<uint8_t>(kFewRows * clusters);
  s.keys = arena.take<int32_t>(kGatherKeys);
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

static Chunks usable_chunks(const AttentionJob& job, const RowBlock& block, const Rows& rows) {
  const QuantumAttentionParams& p = job.params;
  const QuantumAttentionTensors& t = job.tensors;
  const int64_t known = summary_chunks(job.total_len), floats = known * summary_row(p.head_size, p.v_head_size);
  // Without a place to write to, what is not summarised yet is read exactly.
  float* summary = t.present_key_summary ? t.present_key_summary : const_cast<float*>(t.key_summary);
  summary += (block.batch * p.kv_heads + block.kv_head) * floats;
  Chunks chunks{{summary, known, p.head_size, p.v_head_size}, 0, lesser(known, summary_chunks(rows.common_end))};
  while (chunks.begin_key() < rows.common_begin) ++chunks.first;
  for (int64_t c = chunks.first; c < chunks.end; ++c) {
    if (chunks.summary.keys[c * kChunkClusters] != static_cast<float>(kClusterKeys)) chunks.end = c;
  }
  return chunks;
}

// Of one row: weight = log of each cluster's weight, gain = (the error of its means)^2 up to a factor, both from its second
// moments: the mean of exp(q.k) over a cluster is taken for exp(q.mean_key + |q|^2 key_spread / 2 head_size), as if its keys
// lay around their mean alike in all directions.
static void cluster_weights(const AttentionJob& job, const Chunks& chunks, const float* q, float* weight, float* gain) {
  const QuantumAttentionParams& p = job.params;
  const float* key_spread = chunks.summary.key_spread + chunks.first_cluster();
  const float* value_spread = chunks.summary.value_spread + chunks.first_cluster();
  const float* value_norm = chunks.summary.value_norm + chunks.first_cluster();
  float square = 0.0f;
  for (int64_t x = 0; x < p.head_size; ++x) square += q[x] * q[x];
  square /= static_cast<float>(p.head_size);
  vf highest = splat(-kInf);
  for (int64_t c = 0; c < chunks.clusters(); c += kLanes) {
    vf x = load<vf>(weight + c);
    if (p.softcap > 0.0f) x = tanh(x * (1.0f / p.softcap)) * p.softcap;
    x += load<vf>(key_spread + c) * (0.5f * square);
    store(weight + c, x);
    highest = max(x, highest);
  }
  const float most = largest_lane(highest);
  for (int64_t c = 0; c < chunks.clusters(); c += kLanes) {
    const vf w = exp_nonpositive(load<vf>(weight + c) - most);
    // exp(spread) - 1, with a limit that keeps it within float32
    const vf e = exp_nonpositive(-min(load<vf>(key_spread + c) * square, splat(20.0f)));
    store(gain + c, w * w * (load<vf>(value_spread + c) + load<vf>(value_norm + c) * (1.0f - e) / e));
  }
}

// The clusters that were not chosen enter the softmax with all of their keys; returns what l and o are multiplied by.
static float tail_softmax(float* weight, const uint8_t* chosen, int64_t clusters, float& m, float& l) {
  constexpr float kLogKeys = 2.772588722f;  // ln kClusterKeys
  vf highest = splat(-kInf);
  for (int64_t c = 0; c < clusters; c += kLanes) {
    const vf open = load_bias(DType::boolean, reinterpret_cast<const char*>(chosen + c), kLanes);  // -inf: not chosen
    const vf x = open == -kInf ? load<vf>(weight + c) + kLogKeys : splat(-kInf);
    store(weight + c, x);
    highest = max(x, highest);
  }
  return few_softmax(weight, clusters, largest_lane(highest), m, l);
}

// Exact softmax of row r over `count` keys of a list.
static void gathered_keys(const AttentionJob& job, const RowBlock& block, const DecodeScratch& s, int64_t r, int64_t count) {
  const QuantumAttentionParams& p = job.params;
  const KeyRun k = key_run(job, false, block.batch, block.kv_head, 0, count);
  const KeyRun v = key_run(job, true, block.batch, block.kv_head, 0, count);
  const FewProducts products = few_products(p.type, 1);
  const FewState& state = s.few.state;
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
  float alpha = few_softmax(s.few.s, count, largest_lane(highest), state.m[r], state.l[r]);
  float* o = state.o + r * packed_row(p.v_head_size);
  for (int64_t j = 0; j < count; j += kClusterKeys, alpha = 1.0f) {
    products.values(s.few.s + j, 0, {{v.data, v.step, kClusterKeys, v.type}, s.keys + j}, p.v_head_size, &alpha, o, 0);
  }
}

static void chosen_clusters(const AttentionJob& job, const RowBlock& block, const Chunks& chunks, const DecodeScratch& s,
                            int64_t r) {
  const uint8_t* chosen = s.chosen + r * chunks.clusters();
  int64_t count = 0;
  for (int64_t c = 0; c < chunks.clusters(); ++c) {
    if (!chosen[c]) continue;
    const int64_t chunk = chunks.first + c / kChunkClusters;
    const float* members = chunks.summary.members + (chunks.first_cluster() + c) * kClusterKeys;
    for (int64_t i = 0; i < kClusterKeys; ++i) {
      // The state comes from outside: whatever it holds, no key beyond the chunk is read.
      const int32_t place = static_cast<int32_t>(members[i]) & static_cast<int32_t>(kChunkKeys - 1);
      s.keys[count++] = static_cast<int32_t>(kSinkKeys + chunk * kChunkKeys) + place;
    }
    if (count == kGatherKeys) gathered_keys(job, block, s, r, count), count = 0;
  }
  if (count > 0) gathered_keys(job, block, s, r, count);
}

static void tree_decode(const AttentionJob& job, RowBlock block, char* memory) {
  const QuantumAttentionParams& p = job.params;
  Arena arena{memory, 0};
  const DecodeScratch s = decode_scratch(job, arena);
  if (job.tensors.present_key_summary) update_summary(job, block.batch, block.kv_head, s.summary);
  Rows rows;
  set_rows(job, block, rows);
  const FewState& state = s.few.state;
  few_queries(job, block, rows, s.few.q);
  few_start(job, rows.count, state);
  const Chunks chunks = usable_chunks(job, block, rows);
  const int64_t clusters = chunks.clusters(), stride = packed_row(p.head_size);
  const auto budget = [&](int64_t r) {
    const int64_t samples = p.num_samples[p.num_samples_count == 1 ? 0 : rows.head[r]];
    return lesser((samples + kClusterKeys - 1) / kClusterKeys, clusters);
  };
  int64_t least = clusters;
  for (int64_t r = 0; r < rows.count; ++r) least = lesser(least, budget(r));
  if (clusters <= 0 || least == clusters) {
    few_keys(job, block, rows, s.few, rows.begin, rows.end);
    return few_outputs(job, block, rows, state);
  }
  few_keys(job, block, rows, s.few, rows.begin, chunks.begin_key());
  few_keys(job, block, rows, s.few, chunks.end_key(), rows.end);
  const auto means = [&](const float* rows, int64_t size) {
    return KeyRun{reinterpret_cast<const char*>(rows + chunks.first_cluster() * size), size * 4, clusters, DType::f32};
  };
  few_scores(means(chunks.summary.mean_key, p.head_size), s.few.q, rows.count, p.head_size, s.few.keys, s.weight, clusters);
  float alpha[kFewRows];
  for (int64_t r = 0; r < rows.count; ++r) {
    float* weight = s.weight + r * clusters;
    cluster_weights(job, chunks, s.few.q + r * stride, weight, s.gain);
    choose_largest(s.gain, clusters, budget(r), s.chosen + r * clusters);
    alpha[r] = tail_softmax(weight, s.chosen + r * clusters, clusters, state.m[r], state.l[r]);
  }
  few_values(means(chunks.summary.mean_value, p.v_head_size), s.weight, clusters, rows.count, p.v_head_size, alpha, state.o);
  for (int64_t r = 0; r < rows.count; ++r) chosen_clusters(job, block, chunks, s, r);
  few_outputs(job, block, rows, state);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
