// The values in clusters, for `hybrid` with control variate: what a key that is not read is worth (docs/math.md, "hybrid").
#pragma once

#include "key_source.h"
#include "selection.h"
#include "tree_cluster.h"

namespace qexport {
namespace QEXPORT_ISA {

struct ValueScratch {
  ClusterScratch cluster;
  float* points;  // (total_len, packed_row(v_head_size))
  int32_t* list;  // (total_len)
};

static ValueScratch value_scratch(const AttentionJob& job, Arena& arena) {
  const int64_t size = packed_row(job.params.v_head_size);
  ValueScratch s;
  s.cluster = cluster_scratch(arena, job.total_len, size);
  s.points = arena.take<float>(job.total_len * size);
  s.list = arena.take<int32_t>(job.total_len);
  return s;
}

// centre = the mean of the values list[0 .. count), and norm[j] = |v_j - centre| of each. A norm is finite, since x_j = +inf
// marks the keys that are taken: one that runs out of float32, or is no number, is as large as can be.
static void centre_values(Points values, const int32_t* list, int64_t count, float* centre, float* norm) {
  const float share = 1.0f / static_cast<float>(count);
  vf square[kBlockKeys] = {};
  for (int64_t x = 0; x < values.stride; x += kLanes) {
    vf sum{};
    for (int64_t i = 0; i < count; ++i) sum += load<vf>(values.row(list[i]) + x);
    const vf mean = sum * share;
    store(centre + x, mean);
    for (int64_t i = 0; i < count; ++i) {
      const vf rest = load<vf>(values.row(list[i]) + x) - mean;
      square[i] += rest * rest;
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const float length = __builtin_sqrtf(sum_lanes(square[i])[0]);
    norm[list[i]] = length < kLargest ? length : kLargest;
  }
}

// value_cluster, value_centre and value_norm of one kv head, from its valid keys.
static void cluster_values(const AttentionJob& job, int64_t b, int64_t kv_head, char* memory) {
  const QuantumAttentionParams& p = job.params;
  const KeySource source(job, b, kv_head);
  const int64_t size = packed_row(p.v_head_size), head = b * p.kv_heads + kv_head;
  Arena arena{memory, 0};
  const ValueScratch s = value_scratch(job, arena);
  for (int64_t j = 0; j < source.valid; ++j) {
    const char* row = source.row(true, j);
    for (int64_t x = 0; x < size; x += kLanes) store(s.points + j * size + x, row_part(p.type, row, p.v_head_size, x));
    s.list[j] = static_cast<int32_t>(j);
  }
  const Points values{s.points, size};
  cluster(values, s.list, source.valid, s.cluster);
  for (int64_t c = 0; c * kBlockKeys < source.valid; ++c) {
    const int32_t* members = s.list + c * kBlockKeys;
    const int64_t count = lesser(kBlockKeys, source.valid - c * kBlockKeys);
    for (int64_t i = 0; i < count; ++i) job.value_cluster[head * job.total_len + members[i]] = static_cast<int32_t>(c);
    centre_values(values, members, count, job.value_centre + (head * value_clusters(job) + c) * size,
                  job.value_norm + head * job.total_len);
  }
}

// One column of rows: o[lane] += P_c centre_c of every cluster c, with P_c the sum of its p_j whose x_j is not +inf. These
// x_j become 0. Returns the sum of the P_c.
static vf add_centres(const AttentionJob& job, const RowBlock& block, const RowScratch& scratch, int64_t begin, int64_t n,
                      int64_t ld, int64_t live, const float* p, float* x, float* o, int64_t ld_o) {
  const int64_t head = block.batch * job.params.kv_heads + block.kv_head, clusters = value_clusters(job);
  const int32_t* own = job.value_cluster + head * job.total_len + begin;
  const float* centre = job.value_centre + head * clusters * ld_o;
  float* share = scratch.share;
  for (int64_t i = 0; i < clusters * kLanes; i += kLanes) store(share + i, vf{});
  const vf total = sum_in_parts(n, [&](int64_t j) QEXPORT_INLINE_LAMBDA {
    const vi taken = load<vf>(x + j * ld) == kInf;
    const vf rest = taken ? vf{} : load<vf>(p + j * ld);
    store(x + j * ld, taken ? splat(kInf) : vf{});
    float* at = share + own[j] * kLanes;
    store(at, load<vf>(at) + rest);
    return rest;
  });
  for (int64_t c = 0; c < clusters; ++c, share += kLanes, centre += ld_o) {
    for (int64_t lane = 0; lane < live; ++lane) {
      if (share[lane] > 0.0f) add_scaled(o + lane * ld_o, centre, share[lane], ld_o);
    }
  }
  return total;
}

}  // namespace QEXPORT_ISA
}  // namespace qexport
