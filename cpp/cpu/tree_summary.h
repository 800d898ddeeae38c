// Builds the tree of one (batch, kv head): the order of its keys, and the summaries of the clusters.
#pragma once

#include "block_products.h"
#include "tree_cluster.h"

namespace qexport {
namespace QEXPORT_ISA {

constexpr int64_t kSlopeClusters = 64;  // the slope is taken from about so many clusters, evenly spaced
constexpr float kLn2 = 0.6931471805599453f;
// A key that an additive mask lowers by this much has no weight in float32 (unless it lowers every key of the row).
constexpr float kMaskedBias = -1e4f;

struct BuildScratch {
  ClusterScratch cluster;
  float *points, *mean, *variance, *value, *key_rest, *value_rest, *slope, *packed_slope, *ones;
  int32_t *list, *index;
};

static BuildScratch build_scratch(const AttentionJob& job, Arena& arena) {
  const int64_t keys = job.total_len, d = packed_row(job.params.head_size), dv = packed_row(job.params.v_head_size);
  BuildScratch s;
  s.points = arena.take<float>(keys * d);
  s.list = arena.take<int32_t>(keys);
  s.index = arena.take<int32_t>(keys);
  s.cluster = cluster_scratch(arena, keys, d);
  s.mean = arena.take<float>(kBlockKeys * d);
  s.variance = arena.take<float>(kBlockKeys * d);
  s.value = arena.take<float>(kBlockKeys * dv);
  s.key_rest = arena.take<float>(kBlockKeys * d);
  s.value_rest = arena.take<float>(kBlockKeys * dv);
  s.slope = arena.take<float>(d * dv);
  s.packed_slope = arena.take<float>(d * dv);
  s.ones = arena.take<float>(dv);
  return s;
}

// Whether the mask, the same for all rows of the batch item, lets them attend to key j.
static bool key_attended(const AttentionJob& job, int64_t b, int64_t j) {
  const AttentionMask& mask = job.tensors.mask;
  if (!mask.data) return true;
  if (j >= mask.len) return false;
  const char* row = static_cast<const char*>(mask.data) + b * mask.batch_stride * element_size(mask.type);
  if (mask.type == DType::boolean) return row[j] != 0;
  return load_part(mask.type, row + j * element_size(mask.type), 1)[0] > kMaskedBias;
}

// Of a float mask that all rows of a batch item share: whether each of its elements is 0 or shuts its key out, with a key
// left in every batch item (where none is, only exact attention knows what the mask means).
static bool mask_drops_keys(const AttentionJob& job) {
  const AttentionMask& mask = job.tensors.mask;
  const int64_t size = element_size(mask.type);
  for (int64_t b = 0; b < job.params.batch; ++b) {
    const char* row = static_cast<const char*>(mask.data) + b * mask.batch_stride * size;
    bool any = false;
    for (int64_t j = 0; j < lesser(mask.len, job.total_len); ++j) {
      const float bias = load_part(mask.type, row + j * size, 1)[0];
      if (bias != 0.0f && !(bias <= kMaskedBias)) return false;
      any = any || bias == 0.0f;
    }
    if (!any) return false;
  }
  return true;
}

// 16 rows of float32 as the keys or the values of a block.
static void pack_summary_keys(const KvBlocks& blocks, const float* rows, int64_t stride, int64_t size, float* block) {
  for (int64_t j = 0; j < kBlockKeys; ++j) {
    const char* row = reinterpret_cast<const char*>(rows + j * stride);
    if (blocks.precision == Precision::fp32)
      pack_fp32_row<false>(DType::f32, row, size, blocks.key_row, block + j * blocks.key_row);
#if defined(QEXPORT_LOW_PRECISION)
    if (blocks.precision == Precision::bf16)
      pack_bf16_row<false>(DType::f32, row, size, blocks.key_row, block + j * blocks.key_row);
#endif
  }
}

static void pack_summary_values(const KvBlocks& blocks, const float* rows, int64_t stride, int64_t size, float* block) {
#if defined(QEXPORT_TILES)
  if (blocks.tiles) {
    const char* row[kBlockKeys];
    for (int64_t j = 0; j < kBlockKeys; ++j) row[j] = reinterpret_cast<const char*>(rows + j * stride);
    return pack_value_tile<false>(DType::f32, row, size, blocks.value_row, block);
  }
#endif
  for (int64_t j = 0; j < kBlockKeys; j += blocks.precision == Precision::fp32 ? 1 : 2) {
    const char* row = reinterpret_cast<const char*>(rows + j * stride);
    if (blocks.precision == Precision::fp32) {
      pack_fp32_row<false>(DType::f32, row, size, blocks.value_row, block + j * blocks.value_row);
    }
#if defined(QEXPORT_LOW_PRECISION)
    if (blocks.precision == Precision::bf16) {
      pack_bf16_pair<false>(DType::f32, row, row + stride * 4, size, blocks.value_row, block + j / 2 * blocks.value_row);
    }
#endif
  }
}

// mean, variance and, in key_rest, the differences from the mean (of 16 rows; zero where there is no key).
static void summarise_keys(const BuildScratch& s, const int32_t* index, int64_t count, int64_t d, float* mean,
                           float* variance) {
  const float share = 1.0f / static_cast<float>(count);
  for (int64_t x = 0; x < d; x += kLanes) {
    vf sum{}, square{}, row[kBlockKeys];
    for (int64_t j = 0; j < count; ++j) row[j] = load<vf>(s.points + index[j] * d + x), sum += row[j];
    const vf centre = sum * share;
    for (int64_t j = 0; j < kBlockKeys; ++j) {
      const vf rest = j < count ? row[j] - centre : vf{};
      square += rest * rest;
      store(s.key_rest + j * d + x, rest);
    }
    store(mean + x, centre);
    store(variance + x, square * share);
  }
}

// The same for values; returns mean |v - mean v|^2.
static float summarise_values(const BuildScratch& s, const KeySource& source, const int32_t* keys, int64_t count,
                              float* mean) {
  const AttentionJob& job = source.job;
  const int64_t dv = packed_row(job.params.v_head_size);
  const float share = 1.0f / static_cast<float>(count);
  const char* rows[kBlockKeys];
  for (int64_t j = 0; j < count; ++j) rows[j] = source.row(true, keys[j]);
  vf square{};
  for (int64_t x = 0; x < dv; x += kLanes) {
    vf sum{}, row[kBlockKeys];
    for (int64_t j = 0; j < count; ++j)
      row[j] = row_part<false>(job.params.type, rows[j], job.params.v_head_size, x), sum += row[j];
    const vf centre = sum * share;
    for (int64_t j = 0; j < kBlockKeys; ++j) {
      const vf rest = j < count ? row[j] - centre : vf{};
      square += rest * rest;
      store(s.value_rest + j * dv + x, rest);
    }
    store(mean + x, centre);
  }
  return sum_lanes(square)[0] * share;
}

// Slope number `index` of the head, from the sum so far over so many keys.
static void pack_slope(const AttentionJob& job, int64_t head, const float* sum, int64_t keys, int64_t index, float* slope) {
  const KvBlocks& slopes = job.tree.slopes;
  const int64_t rows = packed_row(job.params.head_size), dv = packed_row(job.params.v_head_size);
  const float share = keys ? kLn2 / static_cast<float>(keys) : 0.0f;
  for (int64_t x = 0; x < rows * dv; x += kLanes) store(slope + x, load<vf>(sum + x) * share);
  const int64_t first = index * slope_blocks(job.params.head_size);
  for (int64_t i = 0; i < rows / kBlockKeys; ++i) {
    pack_summary_values(slopes, slope + i * kBlockKeys * dv, dv, job.params.v_head_size,
                        slopes.head_values(head) + slopes.value_start(first + i));
  }
}

static void build_tree(const AttentionJob& job, int64_t b, int64_t kv_head, char* memory) {
  const QuantumAttentionParams& p = job.params;
  const TreeState& tree = job.tree;
  const KeySource source(job, b, kv_head);
  const int64_t head = b * p.kv_heads + kv_head, local = head - job.blocks.first_head;
  const int64_t d = packed_row(p.head_size), dv = packed_row(p.v_head_size);
  Arena arena{memory, 0};
  const BuildScratch s = build_scratch(job, arena);

  int32_t* order = tree.order + local * job.blocks.count * kBlockKeys;
  for (int64_t i = 0; i < job.blocks.count * kBlockKeys; ++i) order[i] = -1;
  int32_t* counts = tree.count + local * tree.clusters;
  for (int64_t c = 0; c < tree.clusters; ++c) counts[c] = 0;
  int64_t used = 0;  // clusters that have keys
  const int64_t chunk = p.is_causal ? kTreeChunk : job.blocks.count * kBlockKeys;
  for (int64_t first = 0; first < source.valid; first += chunk) {
    int64_t n = 0;
    for (int64_t j = first; j < lesser(source.valid, first + chunk); ++j) {
      if (!key_attended(job, b, j)) continue;
      const char* row = source.row(false, j);
      float* point = s.points + (first + n) * d;
      for (int64_t x = 0; x < d; x += kLanes) store(point + x, row_part<false>(p.type, row, p.head_size, x));
      s.list[first + n] = static_cast<int32_t>(first + n), s.index[first + n] = static_cast<int32_t>(j);
      ++n;
    }
    cluster({s.points, d}, s.list + first, n, s.cluster);
    for (int64_t i = first; i < first + n; ++i) order[i] = s.index[s.list[i]];
    for (int64_t i = 0; i < n; i += kBlockKeys, ++used) {
      counts[(first + i) / kBlockKeys] = static_cast<int32_t>(lesser(kBlockKeys, n - i));
    }
  }

  constexpr int64_t kChunkClusters = kTreeChunk / kBlockKeys;
  const int64_t step = p.is_causal ? 2 : (used + kSlopeClusters - 1) / kSlopeClusters;
  for (int64_t x = 0; x < dv; ++x) s.ones[x] = 1.0f;
  for (int64_t x = 0; x < d * dv; x += kLanes) store(s.slope + x, vf{});
  int64_t slope_keys = 0;
  for (int64_t c0 = 0; c0 < tree.clusters; c0 += kBlockKeys) {
    if (p.is_causal && c0 % kChunkClusters == 0 && c0 < job.blocks.count) {
      pack_slope(job, head, s.slope, slope_keys, c0 / kChunkClusters, s.packed_slope);
    }
    for (int64_t c = c0; c < c0 + kBlockKeys; ++c) {
      float *mean = s.mean + (c - c0) * d, *variance = s.variance + (c - c0) * d, *value = s.value + (c - c0) * dv;
      const int64_t keys = counts[c], at = local * tree.clusters + c;
      tree.value_spread[at] = 0.0f;
      if (keys == 0) {
        for (int64_t x = 0; x < d; ++x) mean[x] = variance[x] = 0.0f;
        for (int64_t x = 0; x < dv; ++x) value[x] = 0.0f;
      } else {
        summarise_keys(s, s.list + c * kBlockKeys, keys, d, mean, variance);
        tree.value_spread[at] = summarise_values(s, source, order + c * kBlockKeys, keys, value);
        if (c % step == 0) {
          value_product(s.key_rest, d, s.value_rest, s.slope, dv, d, kBlockKeys, static_cast<int>(dv / kLanes), s.ones);
          slope_keys += keys;
        }
      }
      __builtin_memcpy(tree.mean_value + at * dv, value, static_cast<size_t>(dv) * sizeof(float));
    }
    if (job.blocks.mean_row > 0) {  // whose scores lack q . key_mean too
      for (int64_t i = 0; i < kBlockKeys; ++i) {
        for (int64_t x = 0; x < p.head_size; ++x) s.mean[i * d + x] -= job.blocks.head_mean(head)[x];
      }
    }
    const int64_t block = c0 / kBlockKeys;
    pack_summary_keys(tree.centroids, s.mean, d, p.head_size,
                      tree.centroids.head_keys(head) + block * tree.centroids.key_block);
    pack_summary_values(tree.centroids, s.value, dv, p.v_head_size,
                        tree.centroids.head_values(head) + tree.centroids.value_start(block));
    pack_summary_keys(tree.spreads, s.variance, d, p.head_size,
                      tree.spreads.head_keys(head) + block * tree.spreads.key_block);
  }
  if (!p.is_causal) pack_slope(job, head, s.slope, slope_keys, 0, s.packed_slope);
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
