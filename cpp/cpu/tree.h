// What `tree` keeps of a call: the order of the keys and the summaries of their clusters (docs/math.md, "tree").
//
// A cluster is one block of job.blocks, whose order is the order of the tree. The summaries are blocks themselves, in which
// every cluster is a "key", so that the products of block_products.h serve them too.
#pragma once

#include "kv_blocks.h"

namespace qexport {

constexpr int64_t kTreeRows = 32;    // query rows that share a choice of clusters
constexpr int64_t kTreeChunk = 512;  // under a causal mask no cluster reaches over a multiple of this
constexpr int64_t kProbes = 3;       // tiles of a head that are looked at before its budget is settled
constexpr int64_t kAuditRows = 128;  // rows of a head that are computed exactly to measure its error
constexpr int64_t kMaxDoublings = 16;
constexpr int64_t kHalfSample = 4;  // clusters drawn for each of the two half-samples of a tile

// A tile that shares reads at least and at most so many clusters.
inline int64_t least_shared(int64_t budget) { return (budget + 3) / 4; }
inline int64_t most_shared(int64_t budget) { return 4 * budget; }

// Blocks of a slope with those that are left empty: slopes begin with a pair of blocks (kv_blocks.h).
inline int64_t slope_blocks(int64_t head_size) { return (head_size + 2 * kBlockKeys - 1) / (2 * kBlockKeys) * 2; }

struct TreeState {
  bool used;
  int64_t clusters;    // of a head, rounded up to whole blocks of summaries
  KvBlocks centroids;  // keys: the mean key of each cluster, less key_mean in int8; values: the mean value
  KvBlocks spreads;    // keys: the variance of each element of the keys
  // values: row x is cov(k[x], v) within the clusters of a head, times ln 2; if causal one after the other of those before
  // each chunk
  KvBlocks slopes;
  KvBlocks natural;     // causal only: K and V in their own order
  int32_t* order;       // (heads, 16 * blocks.count) of the heads in memory
  int32_t* count;       // (heads, clusters): keys of the cluster, which fill its first places
  float* value_spread;  // (heads, clusters): mean |v - mean v|^2
  float* mean_value;    // (heads, clusters, packed_row(v_head_size)) float32
  int32_t* budget;      // (batch, q_heads): clusters that a tile reads; at least `clusters`: exact
  // Without a tolerance, where all heads have one budget, the tiles of a batch item share it: a tile reads the clusters
  // whose score reaches the threshold of its head.
  float* threshold;    // (batch, q_heads), 0: each tile reads the budget
  float* probe_score;  // (batch, q_heads, kProbes, clusters)
  float* probe_norm;   // (batch, q_heads, kProbes)
};

}  // namespace qexport
