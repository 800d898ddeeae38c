// The clusters that a tile reads key by key, as the loop of flash.cuh takes them.
#pragma once

#include "tree_tile.cuh"

namespace qexport {
namespace cuda {

// The chosen clusters, and under a causal mask the keys from `open` on as they come.
template <class Tile>
struct ChosenBlocks {
  using T = typename Tile::Flash::T;
  const TreeRowBlock<Tile>& block;
  const int32_t* list;  // null: all clusters
  int chosen;
  int64_t key_end;  // of those as they come
  int head_size, v_head_size;
  float scale;
  const T *keys, *values;

  __device__ __forceinline__ ChosenBlocks(const TreeRowBlock<Tile>& block_, const int32_t* list_, int chosen_)
      : block(block_), list(list_), chosen(chosen_) {
    const TreeLaunch& tree = block.tree;
    head_size = static_cast<int>(tree.job.params.head_size), v_head_size = static_cast<int>(tree.job.params.v_head_size);
    scale = block.factor;
    const int64_t first = block.head * tree.clusters * kCluster;
    keys = static_cast<const T*>(tree.keys) + first * head_size;
    values = static_cast<const T*>(tree.values) + first * v_head_size;
    key_end = key_range(tree.job, block.b, block.first_row + block.rows - 1).hi;
  }
  __device__ __forceinline__ int count() const {
    const int64_t dense = block.tree.job.params.is_causal ? max(key_end - block.open, int64_t{0}) : 0;
    return chosen + static_cast<int>(ceil_div(dense, int64_t{kCluster}));
  }
  __device__ __forceinline__ int cluster(int i) const { return list ? list[i] : i; }
  __device__ __forceinline__ int64_t natural(int i, int row) const {
    return block.open + int64_t{i - chosen} * kCluster + row;
  }
  __device__ __forceinline__ const T* row_at(int i, int row, bool of_values, const T* rows, int size) const {
    if (i < chosen) return rows + (int64_t{cluster(i)} * kCluster + row) * size;
    const int64_t j = natural(i, row);
    if (j >= key_end) return nullptr;
    const int64_t kv_head = block.head % block.tree.job.params.kv_heads;
    return key_row<T>(block.tree.job, of_values, block.b, kv_head, j);
  }
  __device__ __forceinline__ const T* query(int row) const { return block.query(row); }
  __device__ __forceinline__ const T* key(int i, int row) const { return row_at(i, row, false, keys, head_size); }
  __device__ __forceinline__ const T* value(int i, int row) const { return row_at(i, row, true, values, v_head_size); }
  __device__ __forceinline__ bool plain(int i) const {
    if (i < chosen) return cluster(i) < block.full;
    return natural(i, kCluster - 1) <= block.position && natural(i, kCluster) <= key_end;
  }
  __device__ __forceinline__ void prepare(int) {}
  template <int kCount, class At, class Key>
  __device__ __forceinline__ void adjust(int i, int row, const At& at, const Key& key) const {
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      const int k = key(m);
      const bool sees = i < chosen ? k < block.rest : natural(i, k) <= min(block.position + row, key_end - 1);
      at(m) = sees ? at(m) : -kInf;
    }
  }
};

}  // namespace cuda
}  // namespace qexport
