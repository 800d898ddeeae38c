// The clusters that a tile reads key by key, as the loop of flash.cuh takes them.
#pragma once

#include "tree_rows.cuh"

namespace qexport {
namespace cuda {

// The chosen clusters, and under a causal mask the keys from `open` on as they come, kCluster keys each; of both together
// part `part` of `parts`. The loop takes kKeys keys at a time, kShares times for each cluster.
template <class T, int kKeys>
struct ChosenBlocks {
  static constexpr int kShares = kCluster / kKeys;
  static_assert(kCluster % kKeys == 0 && kKeys <= kRun);
  const TreeRows<T>& rows;
  const int32_t* list;  // null: all clusters
  int chosen;
  int first, end;  // of this part
  int natural;     // where keys lie as they come: their block 0
  int key_end;     // of those
  int count;       // of blocks of the loop
  int head_size, v_head_size;
  float scale;
  const T *keys, *values;

  __device__ __forceinline__ ChosenBlocks(const TreeRows<T>& rows_, const int32_t* list_, int chosen_, int part, int parts)
      : rows(rows_), list(list_), chosen(chosen_), natural(static_cast<int>(rows_.tree.clusters)) {
    const TreeLaunch& tree = rows.tree;
    head_size = static_cast<int>(tree.job.params.head_size), v_head_size = static_cast<int>(tree.job.params.v_head_size);
    scale = tree.job.params.scale * kLog2E;
    keys = static_cast<const T*>(tree.keys) + rows.head * tree.stored() * kCluster * head_size;
    values = static_cast<const T*>(tree.values) + rows.head * tree.stored() * kCluster * v_head_size;
    key_end = static_cast<int>(key_range(tree.job, rows.b, rows.row_index(rows.rows - 1)).hi);
    const int64_t all = chosen + (tree.job.params.is_causal ? ceil_div(max(key_end - rows.open, 0), kCluster) : 0);
    first = static_cast<int>(all * part / parts), end = static_cast<int>(all * (part + 1) / parts);
    count = (end - first) * kShares;
  }
  // The cluster, of all that are stored, that block i of the loop is a share of, and its first key there.
  __device__ __forceinline__ int at(int i) const {
    i = first + i / kShares;
    if (i >= chosen) return natural + rows.open / kCluster + i - chosen;
    return list ? __ldg(list + i) : i;
  }
  __device__ __forceinline__ static int first_key(int i) { return i % kShares * kKeys; }
  __device__ __forceinline__ Run<T> run_at(int i, const T* from, int size) const {
    return {from + int64_t{at(i)} * (kCluster * size) + first_key(i) * size, static_cast<unsigned>(size), kKeys};
  }
  __device__ __forceinline__ Run<T> key_run(int i, int) const { return run_at(i, keys, head_size); }
  __device__ __forceinline__ Run<T> value_run(int i, int) const { return run_at(i, values, v_head_size); }
  __device__ __forceinline__ Run<T> query_run(int part) const { return rows.query_run(part); }
  // Of the rows that do not lie at even distances; keys always do.
  __device__ __forceinline__ const T* query(int row) const { return rows.query(row); }
  __device__ __forceinline__ const T* key(int, int) const { return nullptr; }
  __device__ __forceinline__ const T* value(int, int) const { return nullptr; }
  // How many of the keys of cluster c a row sees.
  __device__ __forceinline__ int seen(int c, int row) const {
    if (c < natural) return c < rows.full ? kCluster : rows.rest;
    return min(rows.position(row) + 1, key_end) - (c - natural) * kCluster;
  }
  __device__ __forceinline__ bool plain(int i) const { return seen(at(i), 0) >= first_key(i) + kKeys; }
  __device__ __forceinline__ void prepare(int) {}
  __device__ __forceinline__ bool hides() const { return false; }
  __device__ __forceinline__ bool hidden(int, int) const { return false; }
  template <int kCount, class At, class Key>
  __device__ __forceinline__ void adjust(int i, int row, At score, Key key) const {
    const int limit = row < rows.rows ? seen(at(i), row) - first_key(i) : 0;
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      if (key(m) >= limit) score(m) = -kInf;
    }
  }
};

}  // namespace cuda
}  // namespace qexport
