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
  int64_t key_end;   // of those as they come
  int head_size, v_head_size;
  float scale;
  const T *keys, *values;

  __device__ __forceinline__ ChosenBlocks(const TreeRowBlock<Tile>& block_, const int32_t* list_, int chosen_, int part,
                                          int parts)
      : block(block_), list(list_), chosen(chosen_) {
    const TreeLaunch& tree = block.tree;
    head_size = static_cast<int>(tree.job.params.head_size), v_head_size = static_cast<int>(tree.job.params.v_head_size);
    scale = block.factor;
    const int64_t rows = block.head * tree.clusters * kCluster;
    keys = static_cast<const T*>(tree.keys) + rows * head_size;
    values = static_cast<const T*>(tree.values) + rows * v_head_size;
    key_end = key_range(tree.job, block.b, block.row_index(block.rows - 1)).hi;
    const int64_t dense = tree.job.params.is_causal ? max(key_end - block.open, int64_t{0}) : 0;
    const int64_t all = chosen + ceil_div(dense, int64_t{kCluster});
    first = static_cast<int>(all * part / parts), count = static_cast<int>(all * (part + 1) / parts) - first;
  }
  // Of the blocks of this part, `i`: a cluster, or -1, then keys from `natural` on.
  __device__ __forceinline__ int cluster(int i) const {
    i += first;
    return i >= chosen ? -1 : list ? list[i] : i;
  }
  __device__ __forceinline__ int64_t natural(int i, int row) const {
    return block.open + int64_t{first + i - chosen} * kCluster + row;
  }
  __device__ __forceinline__ const T* row_at(int i, int row, bool of_values, const T* rows, int size) const {
    const int c = cluster(i);
    if (c >= 0) return rows + (int64_t{c} * kCluster + row) * size;
    const int64_t j = natural(i, row);
    if (j >= key_end) return nullptr;
    return key_row<T>(block.tree.job, of_values, block.b, block.head % block.tree.job.params.kv_heads, j);
  }
  __device__ __forceinline__ const T* query(int row) const { return block.query(row); }
  __device__ __forceinline__ const T* key(int i, int row) const { return row_at(i, row, false, keys, head_size); }
  __device__ __forceinline__ const T* value(int i, int row) const { return row_at(i, row, true, values, v_head_size); }
  __device__ __forceinline__ bool plain(int i) const {
    const int c = cluster(i);
    if (c >= 0) return c < block.full;
    return natural(i, kCluster - 1) <= block.position(0) && natural(i, kCluster) <= key_end;
  }
  __device__ __forceinline__ void prepare(int) {}
  __device__ __forceinline__ float score(int i, int row, int key, float x) const {
    if (cluster(i) >= 0) return key < block.rest ? x : -kInf;
    const int64_t j = natural(i, key);
    return row < block.rows && j <= block.position(row) && j < key_end ? x : -kInf;
  }
};

}  // namespace cuda
}  // namespace qexport
