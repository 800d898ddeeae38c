// The clusters that a tile reads key by key, as the loop of flash.cuh takes them.
#pragma once

#include "tree_tile.cuh"

namespace qexport {
namespace cuda {

// The chosen clusters, and under a causal mask the keys from `open` on as they come; of both together part `part` of
// `parts`.
template <class Tile>
struct ChosenBlocks {
  using T = typename Tile::Flash::T;
  const TreeRowBlock<Tile>& block;
  const int32_t* list;  // null: all clusters
  int chosen;
  int first, count;  // the blocks of this part
  int natural;       // where keys lie as they come: their block 0
  int key_end;       // of those
  int head_size, v_head_size;
  float scale;
  const T *keys, *values;

  __device__ __forceinline__ ChosenBlocks(const TreeRowBlock<Tile>& block_, const int32_t* list_, int chosen_, int part,
                                          int parts)
      : block(block_), list(list_), chosen(chosen_), natural(static_cast<int>(block_.tree.clusters)) {
    const TreeLaunch& tree = block.tree;
    head_size = static_cast<int>(tree.job.params.head_size), v_head_size = static_cast<int>(tree.job.params.v_head_size);
    scale = block.factor;
    keys = static_cast<const T*>(tree.keys) + block.head * tree.stored() * kCluster * head_size;
    values = static_cast<const T*>(tree.values) + block.head * tree.stored() * kCluster * v_head_size;
    key_end = static_cast<int>(key_range(tree.job, block.b, block.row_index(block.rows - 1)).hi);
    const int64_t all = chosen + (tree.job.params.is_causal ? ceil_div(max(key_end - block.open, 0), kCluster) : 0);
    first = static_cast<int>(all * part / parts), count = static_cast<int>(all * (part + 1) / parts) - first;
  }
  // Where block i of this part lies among all that are stored.
  __device__ __forceinline__ int at(int i) const {
    i += first;
    if (i >= chosen) return natural + block.open / kCluster + i - chosen;
    return list ? list[i] : i;
  }
  __device__ __forceinline__ const T* query(int row) const { return block.query(row); }
  __device__ __forceinline__ const T* key(int i, int row) const {
    return keys + (int64_t{at(i)} * kCluster + row) * head_size;
  }
  __device__ __forceinline__ const T* value(int i, int row) const {
    return values + (int64_t{at(i)} * kCluster + row) * v_head_size;
  }
  __device__ __forceinline__ bool plain(int i) const {
    const int c = at(i);
    return c < natural ? c < block.full : (c - natural + 1) * kCluster <= min(block.position(0) + 1, key_end);
  }
  __device__ __forceinline__ void prepare(int) {}
  __device__ __forceinline__ bool hides() const { return false; }
  __device__ __forceinline__ bool hidden(int, int) const { return false; }
  template <int kCount, class At, class Key>
  __device__ __forceinline__ void adjust(int i, int row, At score, Key key) const {
    const int c = at(i);
    int seen = block.rest;  // keys of the block
    if (c >= natural) seen = row < block.rows ? min(block.position(row) + 1, key_end) - (c - natural) * kCluster : 0;
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      if (key(m) >= seen) score(m) = -kInf;
    }
  }
};

}  // namespace cuda
}  // namespace qexport
