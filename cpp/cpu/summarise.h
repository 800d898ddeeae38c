// Fills one chunk of key_summary: 512 keys in clusters of 16 by a balanced principal tree, and the means of each cluster.
#pragma once

#include "key_rows.h"
#include "qexport/key_summary.h"
#include "tree_cluster.h"

namespace qexport {
namespace QEXPORT_ISA {

struct SummaryScratch {
  float *keys, *values, *mean;
  int32_t* order;
  ClusterScratch cluster;
};

static SummaryScratch summary_scratch(const AttentionJob& job, Arena& arena) {
  const int64_t row = packed_row(job.params.head_size), v_row = packed_row(job.params.v_head_size);
  SummaryScratch s;
  s.keys = arena.take<float>(kChunkKeys * row);
  s.values = arena.take<float>(kChunkKeys * v_row);
  s.mean = arena.take<float>(greater(row, v_row));
  s.order = arena.take<int32_t>(kChunkKeys);
  s.cluster = cluster_scratch(arena, kChunkKeys, row);
  return s;
}

static size_t summary_bytes(const AttentionJob& job) {
  Arena arena{nullptr, 0};
  summary_scratch(job, arena);
  return arena.used;
}

// mean[0 .. stride) of the rows of a cluster.
static void cluster_mean(Points points, const int32_t* order, float* mean) {
  for (int64_t x = 0; x < points.stride; x += kLanes) {
    vf sum{};
    for (int64_t i = 0; i < kClusterKeys; ++i) sum += load<vf>(points.row(order[i]) + x);
    store(mean + x, sum * (1.0f / static_cast<float>(kClusterKeys)));
  }
}

// Mean of |row - origin|^2 over a cluster.
static float cluster_spread(Points points, const int32_t* order, const float* origin) {
  vf sum{};
  for (int64_t i = 0; i < kClusterKeys; ++i) {
    for (int64_t x = 0; x < points.stride; x += kLanes) {
      const vf d = load<vf>(points.row(order[i]) + x) - load<vf>(origin + x);
      sum += d * d;
    }
  }
  return sum_lanes(sum)[0] * (1.0f / static_cast<float>(kClusterKeys));
}

// Fills chunk `chunk` of a head's summary.
static void summarise_chunk(const AttentionJob& job, int64_t b, int64_t kv_head, int64_t chunk, const HeadSummary& summary,
                            char* memory) {
  const QuantumAttentionParams& p = job.params;
  Arena arena{memory, 0};
  const SummaryScratch s = summary_scratch(job, arena);
  const int64_t stride = packed_row(p.head_size), v_stride = packed_row(p.v_head_size);
  for (int64_t x = 0; x < kChunkKeys * stride; x += kLanes) store(s.keys + x, vf{});
  for (int64_t x = 0; x < kChunkKeys * v_stride; x += kLanes) store(s.values + x, vf{});
  for (int64_t j = 0; j < kChunkKeys; ++j) {
    const int64_t key = kSinkKeys + chunk * kChunkKeys + j;
    read_row(p.type, key_run(job, false, b, kv_head, key, 1).data, p.head_size, s.keys + j * stride);
    read_row(p.type, key_run(job, true, b, kv_head, key, 1).data, p.v_head_size, s.values + j * v_stride);
  }
  for (int32_t i = 0; i < kChunkKeys; ++i) s.order[i] = i;
  const Points keys{s.keys, stride}, values{s.values, v_stride};
  cluster(keys, s.order, kChunkKeys, s.cluster);
  const int32_t* order = s.order;
  for (int64_t c = chunk * kChunkClusters; c < (chunk + 1) * kChunkClusters; ++c, order += kClusterKeys) {
    summary.keys[c] = static_cast<float>(kClusterKeys);
    for (int64_t i = 0; i < kClusterKeys; ++i) {
      summary.members[c * kClusterKeys + i] = static_cast<float>(order[i]);
    }
    cluster_mean(keys, order, s.mean);
    for (int64_t x = 0; x < p.head_size; ++x) summary.mean_key[c * p.head_size + x] = s.mean[x];
    summary.key_spread[c] = cluster_spread(keys, order, s.mean);
    cluster_mean(values, order, s.mean);
    for (int64_t x = 0; x < p.v_head_size; ++x) summary.mean_value[c * p.v_head_size + x] = s.mean[x];
    summary.value_spread[c] = cluster_spread(values, order, s.mean);
    for (int64_t x = 0; x < v_stride; ++x) s.mean[x] = 0.0f;
    summary.value_norm[c] = cluster_spread(values, order, s.mean);
  }
}

// Brings the summary of one kv head up to date: chunks that the new tokens have filled, or that were never summarised, are
// made; a chunk that is not full is marked as such, since the cache may have been cut back.
static void update_summary(const AttentionJob& job, int64_t b, int64_t kv_head, char* memory) {
  const QuantumAttentionParams& p = job.params;
  const int64_t chunks = summary_chunks(job.total_len), floats = chunks * summary_row(p.head_size, p.v_head_size);
  const int64_t len = lesser(given_len(job, b), job.total_len);
  const int64_t at = (b * p.kv_heads + kv_head) * floats;
  float* out = job.tensors.present_key_summary + at;
  const float* in = job.tensors.key_summary + at;
  if (in != out) __builtin_memcpy(out, in, static_cast<size_t>(floats) * sizeof(float));
  const HeadSummary summary(out, chunks, p.head_size, p.v_head_size);
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t end = kSinkKeys + (c + 1) * kChunkKeys;
    float& mark = summary.keys[c * kChunkClusters];
    if (end > len) {
      mark = 0.0f;
    } else if (end > len - p.q_len || mark != static_cast<float>(kClusterKeys)) {
      summarise_chunk(job, b, kv_head, c, summary, memory);
    }
  }
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
