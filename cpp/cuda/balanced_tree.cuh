// The balanced tree over the keys or the values of each (batch, kv head): an order of them in which every run of `cluster`
// rows is a cluster (docs/math.md, "tree", "Clusters").
#pragma once

#include "attention.cuh"

namespace qexport {
namespace cuda {

struct BalancedTree {
  bool values;      // of V; else of K
  bool masked;      // without the rows that the mask shuts out: a boolean one, the same for all queries and heads
  int64_t cluster;  // rows of a cluster; all but the last are full
  int64_t chunk;    // no cluster reaches over a multiple of this, which is one of `cluster`; at least total_len: one chunk
};

// Rows of the order of one (batch, kv head), and the chunks they are in.
inline int64_t tree_chunks(const AttentionJob& job, const BalancedTree& tree) { return ceil_div(job.total_len, tree.chunk); }
inline int64_t tree_places(const AttentionJob& job, const BalancedTree& tree) {
  const int64_t chunk = tree.chunk < job.total_len ? tree.chunk : job.total_len;
  return tree_chunks(job, tree) * ceil_div(chunk, tree.cluster) * tree.cluster;
}

// order: (batch, kv_heads, tree_places) rows of K or V, -1 where there is none, which is at the end of each chunk alone.
// count: (batch, kv_heads, tree_chunks) rows of each chunk. Rows from nonpad_kv_seqlen on take no part.
void balanced_tree(Status& status, const AttentionJob& job, const BalancedTree& tree, int32_t* order, int32_t* count,
                   void* scratch, void* stream);
size_t balanced_tree_scratch_bytes(const AttentionJob& job, const BalancedTree& tree);

}  // namespace cuda
}  // namespace qexport
