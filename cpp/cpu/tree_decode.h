// Decoding with strategy tree from a key_summary (docs/math.md): the mean keys of all clusters are scored, the clusters that
// matter most to a query are read exactly, the others enter by their means, and a sample of these tells the error. Chunks
// that are not full, and the first keys, are always read. A step reads a tenth of the cache.
#pragma once

#include "decode_residual.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr float kToleranceMargin = 0.8f;  // of the tolerance: what an estimate must keep to
constexpr float kHopeless = 2.0f;         // of that: a head whose estimate is above it does not try to read more
constexpr int64_t kMostTried = 4;         // one in so many clusters is the most that a head reads for a tolerance

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

// The clusters that were not chosen enter the softmax with all of their keys, with `tail` for weights; returns what l and o
// are multiplied by.
static float tail_softmax(const float* weight, const uint8_t* chosen, int64_t clusters, float* tail, float& m, float& l) {
  constexpr float kLogKeys = 2.772588722f;  // ln kClusterKeys
  vf highest = splat(-kInf);
  for (int64_t c = 0; c < clusters; c += kLanes) {
    const vf open = load_bias(DType::boolean, reinterpret_cast<const char*>(chosen + c), kLanes);  // -inf: not chosen
    const vf x = open == -kInf ? load<vf>(weight + c) + kLogKeys : splat(-kInf);
    store(tail + c, x);
    highest = max(x, highest);
  }
  return few_softmax(tail, clusters, largest_lane(highest), m, l);
}

static KeyRun cluster_means(const Chunks& chunks, const float* rows, int64_t size) {
  return {reinterpret_cast<const char*>(rows + chunks.first_cluster() * size), size * 4, chunks.clusters(), DType::f32};
}

// s.whole = the keys that were read and the means of all other clusters.
static void add_means(const AttentionJob& job, const Chunks& chunks, const DecodeScratch& s, int64_t rows) {
  const int64_t clusters = chunks.clusters(), dv = job.params.v_head_size;
  const FewState &read = s.few.state, &whole = s.whole;
  float alpha[kFewRows];
  for (int64_t r = 0; r < rows; ++r) {
    whole.m[r] = read.m[r], whole.l[r] = read.l[r];
    alpha[r] = tail_softmax(s.weight + r * clusters, s.chosen + r * clusters, clusters, s.tail + r * clusters, whole.m[r],
                            whole.l[r]);
  }
  for (int64_t i = 0; i < rows * packed_row(dv); i += kLanes) store(whole.o + i, load<vf>(read.o + i));
  few_values(cluster_means(chunks, chunks.summary.mean_value, dv), s.tail, clusters, rows, dv, alpha, whole.o);
}

// All keys, for all rows: at once, or, where a tolerance was not kept, by exact_part later.
static void read_all(const AttentionJob& job, const RowBlock& block, const Rows& rows, const DecodeScratch& s) {
  if (job.parts > 1) return;
  few_keys(job, block, rows, s.few, rows.begin, rows.end);
  few_outputs(job, block, rows, s.few.state);
}

// o of row r divided by l.
static float* normalised_row(const FewState& state, int64_t r, int64_t stride) {
  float* o = state.o + r * stride;
  const float inverse = state.l[r] == 0.0f ? 0.0f : 1.0f / state.l[r];
  for (int64_t x = 0; x < stride; ++x) o[x] *= inverse;
  return o;
}

// s.whole.o = the output of the rows of head h of the group, corrected as `residual` says. Returns its relative error as
// estimated, 0 where nobody asks for it. `attempt` counts the budgets that were tried.
static double settle_head(const AttentionJob& job, const RowBlock& block, const Rows& rows, const Chunks& chunks,
                          const DecodeScratch& s, int64_t h, int64_t attempt) {
  const QuantumAttentionParams& p = job.params;
  const int64_t head = block.batch * p.q_heads + block.kv_head * job.group + h;
  const int64_t position = given_len(job, block.batch) - p.q_len;
  const bool corrects = p.residual == Residual::unbiased || p.residual == Residual::james_stein;
  const bool draws = corrects || p.error_tolerance > 0.0f || job.tensors.error_estimate;
  double square = 0.0, norm = 0.0;
  for (int64_t r = h * p.q_len; r < (h + 1) * p.q_len; ++r) {
    float* y = normalised_row(s.whole, r, packed_row(p.v_head_size));
    if (!draws) continue;
    const PhiloxBlock counter{{p.layer, static_cast<uint32_t>(head), static_cast<uint32_t>(position + rows.query[r]),
                               kDecodeDraw + static_cast<uint32_t>(attempt)}};
    const RowError row = settle_residual(job, block, chunks, s, r, y, counter);
    square += row.square, norm += row.norm;
  }
  return square > 0.0 ? __builtin_sqrt(square / norm) : 0.0;
}

static void tree_decode(const AttentionJob& job, RowBlock block, char* memory) {
  const QuantumAttentionParams& p = job.params;
  Arena arena{memory, 0};
  const DecodeScratch s = decode_scratch(job, arena);
  if (job.tensors.present_key_summary) update_summary(job, block.batch, block.kv_head, s.summary);
  Rows rows;
  set_rows(job, block, rows);
  few_queries(job, block, rows, s.few.q);
  few_start(job, rows.count, s.few.state);
  const Chunks chunks = usable_chunks(job, block, rows);
  const int64_t clusters = greater<int64_t>(chunks.clusters(), 0), stride = packed_row(p.head_size);
  int64_t budget[kFewRows], least = clusters, most = 0;
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t samples = p.num_samples[p.num_samples_count == 1 ? 0 : rows.head[r]];
    budget[r] = lesser((samples + kClusterKeys - 1) / kClusterKeys, clusters);
    // Few beside those that are drawn to tell the error, to begin with or to be left, save nothing.
    if (p.error_tolerance > 0.0f) budget[r] = greater(budget[r], kResidualClusters);
    if (budget[r] + kResidualClusters >= clusters) budget[r] = clusters;
    least = lesser(least, budget[r]), most = greater(most, budget[r]);
  }
  const bool too_many = p.error_tolerance > 0.0f && kMostTried * most > clusters;
  if (least == clusters || too_many) return read_all(job, block, rows, s);
  few_keys(job, block, rows, s.few, rows.begin, chunks.begin_key());
  few_keys(job, block, rows, s.few, chunks.end_key(), rows.end);
  few_scores(cluster_means(chunks, chunks.summary.mean_key, p.head_size), s.few.q, rows.count, p.head_size, s.few.keys,
             s.weight, clusters);
  for (int64_t r = 0; r < rows.count; ++r) {
    cluster_weights(job, chunks, s.few.q + r * stride, s.weight + r * clusters, s.gain + r * clusters);
  }
  for (int64_t i = 0; i < rows.count * clusters; ++i) s.read[i] = 0;
  const int64_t first_head = block.batch * p.q_heads + block.kv_head * job.group;
  const double limit = static_cast<double>(kToleranceMargin * p.error_tolerance);
  double estimate[kFewRows];
  bool done[kFewRows] = {};  // heads
  for (int64_t attempt = 0, open = job.group; open > 0; ++attempt) {
    for (int64_t r = 0; r < rows.count; ++r) {
      if (done[r / p.q_len]) continue;
      choose_largest(s.gain + r * clusters, clusters, budget[r], s.chosen + r * clusters);
      read_chosen(job, block, chunks, s, r);
    }
    add_means(job, chunks, s, rows.count);
    for (int64_t h = 0; h < job.group; ++h) {
      if (done[h]) continue;
      estimate[h] = settle_head(job, block, rows, chunks, s, h, attempt);
      if (p.error_tolerance > 0.0f && !(estimate[h] <= limit)) {
        const int64_t more = 2 * budget[h * p.q_len];
        if (!(estimate[h] <= kHopeless * limit) || kMostTried * more > clusters) return read_all(job, block, rows, s);
        for (int64_t r = h * p.q_len; r < (h + 1) * p.q_len; ++r) budget[r] = more;
        continue;
      }
      done[h] = true, --open;
      for (int64_t r = h * p.q_len; r < (h + 1) * p.q_len; ++r) {
        write_row(p.type, s.whole.o + r * packed_row(p.v_head_size), p.v_head_size,
                  output_row(job, block.batch, rows.head[r], rows.query[r]));
      }
    }
  }
  if (job.parts > 1) job.parts_left[block.batch * p.kv_heads + block.kv_head] = 0;
  if (!job.tensors.error_estimate) return;
  for (int64_t h = 0; h < job.group; ++h) job.tensors.error_estimate[first_head + h] = static_cast<float>(estimate[h]);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
