// What the means of the clusters that a decoding row did not read got wrong, from a sample of these clusters: how far off
// the output is, and, if `residual` says so, a correction.
#pragma once

#include "decode_gather.h"
#include "tree_select.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr uint32_t kDecodeDraw = 3;  // 0 to 2 are draws of tiles
// |sum d|^2 / (sum |d|)^2 of what clusters get wrong, at least: how alike their errors are. Measured: docs/math.md.
constexpr float kCoherence = 0.09f;

struct RowError {
  double square, norm;  // squared error of the output as estimated, its squared norm
};

// size = sqrt(gain) + a quarter of its mean over the clusters that may be drawn, so that none has a vanishing probability.
static void residual_sizes(const float* gain, const uint8_t* chosen, int64_t clusters, float* size) {
  float sum = 0.0f;
  int64_t open = 0;
  for (int64_t c = 0; c < clusters; ++c) {
    size[c] = __builtin_sqrtf(gain[c]);
    sum += chosen[c] ? 0.0f : size[c];
    open += !chosen[c];
  }
  const float least = open ? 0.25f * sum / static_cast<float>(open) : 0.0f;
  for (int64_t c = 0; c < clusters; c += kLanes) store(size + c, load<vf>(size + c) + least);
}

struct ResidualSums {
  float length, squares;  // of |d / pi| and |d / pi|^2 over the sample
  int64_t count;
};

// s.residual = the sum over the sample of d / pi, where d is what reading a cluster of row r adds to its normalised output
// y, to first order.
static ResidualSums sample_residual(const AttentionJob& job, const RowBlock& block, const Chunks& chunks,
                                    const DecodeScratch& s, int64_t r, const float* y, uint32_t random) {
  const QuantumAttentionParams& p = job.params;
  const int64_t clusters = chunks.clusters(), dv = p.v_head_size;
  int32_t list[kResidualClusters + 1];
  float factor[kResidualClusters + 1], weight[kResidualClusters + 1], more[kResidualClusters + 1];
  residual_sizes(s.gain + r * clusters, s.chosen + r * clusters, clusters, s.size);
  ResidualSums sums{0.0f, 0.0f, 0};
  sums.count = sample_clusters(s.size, s.chosen + r * clusters, clusters, kResidualClusters, random, list, factor);
  for (int64_t x = 0; x < dv; x += kLanes) store(s.residual + x, vf{});
  if (sums.count == 0) return sums;
  for (int64_t i = 0; i < sums.count; ++i) list_cluster(chunks, list[i], s.keys + i * kClusterKeys);
  const int64_t count = sums.count * kClusterKeys;
  const KeyRun k = key_run(job, false, block.batch, block.kv_head, 0, count);
  const KeyRun v = key_run(job, true, block.batch, block.kv_head, 0, count);
  // A key that was drawn may pass the largest score so far.
  const float highest = greater(gathered_scores(job, k, v, s, r, count), s.whole.m[r]);
  const float scale = exp_nonpositive(splat(s.whole.m[r] - highest))[0];
  // The sum of weights, with what the sample has beyond its means: one huge key that was drawn cannot pass it by far.
  float known = s.whole.l[r] * scale;
  for (int64_t i = 0; i < sums.count; ++i) {
    vf total{};
    for (int64_t j = i * kClusterKeys; j < (i + 1) * kClusterKeys; j += kLanes) {
      const vf e = exp_nonpositive(load<vf>(s.few.s + j) - highest);
      store(s.few.s + j, e);
      total += e;
    }
    weight[i] = s.tail[r * clusters + list[i]] * scale;
    more[i] = sum_lanes(total)[0] - weight[i];
    known += greater(more[i], 0.0f);
  }
  for (int64_t i = 0; i < sums.count; ++i) {
    const float* mean = chunks.summary.mean_value + (chunks.first_cluster() + list[i]) * dv;
    const float zero = 0.0f, share = factor[i] / known;
    const ListedRows values = cluster_values(s, v, i * kClusterKeys);
    for (int64_t x = 0; x < dv; x += kLanes) store(s.cluster + x, vf{});
    few_products(p.type, 1).values(s.few.s + i * kClusterKeys, 0, values, dv, &zero, s.cluster, 0);
    vf square{};
    for (int64_t x = 0; x < dv; x += kLanes) {
      const vf nu = load_part(DType::f32, reinterpret_cast<const char*>(mean + x), lesser<int64_t>(kLanes, dv - x));
      const vf d = (load<vf>(s.cluster + x) - nu * weight[i] - load<vf>(y + x) * more[i]) * share;
      store(s.residual + x, load<vf>(s.residual + x) + d);
      square += d * d;
    }
    const float d2 = sum_lanes(square)[0];
    sums.squares += d2, sums.length += __builtin_sqrtf(d2);
  }
  return sums;
}

// Corrects the normalised output y of row r as `residual` says and estimates what is wrong with it then.
static RowError settle_residual(const AttentionJob& job, const RowBlock& block, const Chunks& chunks, const DecodeScratch& s,
                                int64_t r, float* y, PhiloxBlock counter) {
  const QuantumAttentionParams& p = job.params;
  const uint64_t seed = static_cast<uint64_t>(p.seed);
  const PhiloxBlock random = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), counter);
  const ResidualSums sums = sample_residual(job, block, chunks, s, r, y, random.word[0]);
  vf whole{};
  for (int64_t x = 0; x < p.v_head_size; x += kLanes) whole += load<vf>(s.residual + x) * load<vf>(s.residual + x);
  // Of n parts z whose sum is D, sum |z|^2 - |D|^2 / n is (1 - 1 / n) times the variance of D; |D|^2 is that too large.
  const float square = sum_lanes(whole)[0], n = static_cast<float>(greater<int64_t>(sums.count, 2));
  const float variance = greater(sums.squares - square / n, 0.0f) * n / (n - 1.0f);
  const float surplus = greater(square - variance, 0.0f);
  const float error = greater(surplus, kCoherence * sums.length * sums.length);
  float shrink = p.residual == Residual::unbiased ? 1.0f : 0.0f;
  if (p.residual == Residual::james_stein && surplus > 0.0f) shrink = surplus / square;
  vf norm{};
  for (int64_t x = 0; x < p.v_head_size; x += kLanes) {
    const vf corrected = load<vf>(y + x) + load<vf>(s.residual + x) * shrink;
    store(y + x, corrected);
    norm += corrected * corrected;
  }
  const float keep = 1.0f - shrink;
  return {static_cast<double>(keep * keep * error + shrink * shrink * variance), static_cast<double>(sum_lanes(norm)[0])};
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
