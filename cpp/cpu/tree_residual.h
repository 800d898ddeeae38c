// The sampled residual of a tile: what the centroids got wrong, from two independent half-samples of the clusters that were
// not read.
#pragma once

#include "tree_tile.h"

namespace qexport {
namespace QEXPORT_ISA {

// x = sqrt(score) + a quarter of its mean over the clusters that may be drawn, so that none has a vanishing probability.
static void draw_sizes(Tile& t) {
  float sum = 0.0f;
  int64_t open = 0;
  const int32_t* count = t.job.tree.count + t.local * t.job.tree.clusters;
  for (int64_t c = 0; c < t.candidates; ++c) {
    if (t.s.chosen[c] || count[c] == 0) continue;
    sum += __builtin_sqrtf(t.s.score[c]);
    ++open;
  }
  const float least = open ? 0.25f * sum / static_cast<float>(open) : 0.0f;
  for (int64_t c = 0; c < t.candidates; ++c) t.s.draw[c] = count[c] ? __builtin_sqrtf(t.s.score[c]) + least : 0.0f;
}

// One half-sample: half = sum over its clusters of (exact - centroid) / pi in units of 2^-m, and the same for the sum of
// weights. `scores` are those of the listed clusters.
static void half_sample(Tile& t, const int32_t* list, const float* factor, int64_t count, float* scores, float* half,
                        float* total) {
  const KvBlocks& blocks = t.job.blocks;
  const TreeState& tree = t.job.tree;
  const int64_t ld = t.ld, dv = t.job.params.v_head_size, row = packed_row(dv);
  const bool pairs = blocks.precision != Precision::fp32;
  alignas(64) float minus[(kHalfSample + 1) * kTreeRows], ones[kTreeRows];
  for (int64_t at = 0; at < ld; at += kLanes) {
    const vf origin = load<vf>(t.m + at);
    vf sum{}, tail{};
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = i * kBlockKeys; j < (i + 1) * kBlockKeys; j += 2) {
        const vf lo = exp2(load<vf>(scores + j * ld + at) - origin) * factor[i];
        const vf hi = exp2(load<vf>(scores + (j + 1) * ld + at) - origin) * factor[i];
        sum += lo + hi;
        if (pairs) {
#if defined(QEXPORT_LOW_PRECISION)
          store(scores + j / 2 * ld + at, bf16_pairs(lo, hi));
#endif
        } else {
          store(scores + j * ld + at, lo);
          store(scores + (j + 1) * ld + at, hi);
        }
      }
      const vf w = exp2(load<vf>(t.s.weight + list[i] * ld + at) - origin) * factor[i];
      tail += w;
      store(minus + i * ld + at, -w);
    }
    store(total + at, sum - tail);
    store(ones + at, splat(1.0f));
    for (int64_t x = 0; x < dv; ++x) store(half + x * ld + at, -tail * load<vf>(t.s.slope + x * ld + at));
  }
  for (int64_t i = 0; i < count; ++i) {
    __builtin_memcpy(t.s.sampled_mean + i * row, tree.mean_value + (t.local * tree.clusters + list[i]) * row,
                     static_cast<size_t>(row) * sizeof(float));
  }
  value_blocks(blocks, blocks.head_values(t.head), list, count, scores, half, ld, t.rows.vecs, nullptr);
  value_product(t.s.sampled_mean, row, minus, half, ld, dv, count, t.rows.vecs, ones);
}

// Draws both half-samples and corrects O and l by their mean, which james_stein shrinks by the share of it that both agree
// on.
static void correct_tail(Tile& t) {
  const QuantumAttentionParams& p = t.job.params;
  const KvBlocks& blocks = t.job.blocks;
  const int64_t ld = t.ld, dv = p.v_head_size;
  const uint64_t seed = static_cast<uint64_t>(p.seed);
  int32_t list[2 * (kHalfSample + 1)];
  float factor[2 * (kHalfSample + 1)];
  int64_t count[2], drawn = 0;
  draw_sizes(t);
  for (uint32_t h = 0; h < 2; ++h) {
    const PhiloxBlock counter{
        {p.layer, static_cast<uint32_t>(t.block.batch * p.q_heads + t.q_head), static_cast<uint32_t>(t.index), h}};
    const PhiloxBlock random = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), counter);
    count[h] =
        sample_clusters(t.s.draw, t.s.chosen, t.candidates, kHalfSample, random.word[0], list + drawn, factor + drawn);
    drawn += count[h];
  }
  float* scores = t.s.exact.s;
  score_blocks(blocks, blocks.head_keys(t.head), list, drawn, t.s.exact.q_t, t.s.exact.q_scale, scores, ld, t.rows.vecs);
  for (int64_t i = 0; i < drawn; ++i) mask_empty(t, list[i], scores + i * kBlockKeys * ld);
  float* o = t.s.exact.o_t;
  alignas(64) float total[2][kTreeRows];
  for (int64_t at = 0; at < ld; at += kLanes) {  // a key that was drawn may pass the maximum so far
    const vf m = load<vf>(t.m + at);
    vf highest = m;
    for (int64_t j = 0; j < drawn * kBlockKeys; ++j) highest = max(load<vf>(scores + j * ld + at), highest);
    for (int64_t i = 0; i < drawn; ++i) highest = max(load<vf>(t.s.weight + list[i] * ld + at), highest);
    const vf scale = exp2(m - (highest == -kInf ? vf{} : highest));
    store(t.m + at, highest);
    store(t.l + at, load<vf>(t.l + at) * scale);
    for (int64_t x = 0; x < dv; ++x) store(o + x * ld + at, load<vf>(o + x * ld + at) * scale);
  }
  half_sample(t, list, factor, count[0], scores, t.s.half[0], total[0]);
  half_sample(t, list + count[0], factor + count[0], count[1], scores + count[0] * kBlockKeys * ld, t.s.half[1], total[1]);

  float shrink = 1.0f;
  if (p.residual == Residual::james_stein) {
    // With D1 and D2 what the half-samples add to the output: <D1, D2> / |(D1 + D2) / 2|^2.
    vf product{}, square{};
    for (int64_t at = 0; at < ld; at += kLanes) {
      const vf l = load<vf>(t.l + at), inverse = l > 0.0f ? load<vf>(t.live + at) / l : vf{};
      const vf z0 = load<vf>(total[0] + at), z1 = load<vf>(total[1] + at);
      for (int64_t x = 0; x < dv; ++x) {
        const vf y = load<vf>(o + x * ld + at) * inverse;
        const vf d0 = (load<vf>(t.s.half[0] + x * ld + at) - z0 * y) * inverse;
        const vf d1 = (load<vf>(t.s.half[1] + x * ld + at) - z1 * y) * inverse;
        product += d0 * d1, square += (d0 + d1) * (d0 + d1) * 0.25f;
      }
    }
    const float whole = sum_lanes(square)[0];
    shrink = whole > 0.0f ? lesser(greater(sum_lanes(product)[0] / whole, 0.0f), 1.0f) : 0.0f;
  }
  const float share = 0.5f * shrink;
  for (int64_t at = 0; at < ld; at += kLanes) {
    const vf l = load<vf>(t.l + at), z = load<vf>(total[0] + at) + load<vf>(total[1] + at);
    store(t.l + at, max(l + z * share, l * 0.5f));  // a weight of zero or less would have no meaning
    for (int64_t x = 0; x < dv; ++x) {
      const vf n = load<vf>(t.s.half[0] + x * ld + at) + load<vf>(t.s.half[1] + x * ld + at);
      store(o + x * ld + at, load<vf>(o + x * ld + at) + n * share);
    }
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
