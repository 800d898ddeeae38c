// The nodes of a balanced tree, and their rows: where they are, and those that a block has copied to shared memory.
#pragma once

#include "balanced_tree.cuh"
#include "node_direction.cuh"

namespace qexport {
namespace cuda {

// A root is one chunk of one (batch, kv head).
struct TreeShape {
  BalancedTree tree;
  int64_t chunks, chunk_places;
  int size, width;  // elements of a row, and rounded up
  bool aligned;
  int multiprocessors;
  int32_t subtree;  // places of the largest node that one block divides down to its clusters; 0: no node fits
  __device__ __forceinline__ int64_t first_place(int64_t root) const { return root * chunk_places; }
};

struct TreeNode {
  int32_t first, count, left;  // places [first, first + count) of the list above, of which `left` go to the first half
};

// Node `index` of level `level` below a list; where there is nothing to divide, left and count are 0, and `first` is a place
// that nobody writes to any more.
__device__ __forceinline__ TreeNode find_node(int32_t count, int32_t cluster, int32_t index, int level) {
  TreeNode node{0, count, 0};
  for (int bit = level;; --bit) {
    if (node.count <= cluster) return {node.first, 0, 0};
    node.left = (ceil_div(node.count, cluster) + 1) / 2 * cluster;
    if (bit == 0) return node;
    if (index >> (bit - 1) & 1) {
      node.first += node.left, node.count -= node.left;
    } else {
      node.count = node.left;
    }
  }
}

// Node `index` of a level of all roots, and where its places are.
struct NodePlace {
  int64_t root, at;
  TreeNode node;
};
__device__ __forceinline__ NodePlace find_place(const TreeShape& shape, const int32_t* count, int64_t index, int level) {
  const int64_t root = index >> level;
  const TreeNode node = find_node(count[root], static_cast<int32_t>(shape.tree.cluster),
                                  static_cast<int32_t>(index & ((int64_t{1} << level) - 1)), level);
  return {root, shape.first_place(root) + node.first, node};
}

template <class T>
struct RowAt {
  const AttentionJob& job;
  const TreeShape& shape;
  int64_t b, kv_head;
  __device__ __forceinline__ RowAt(const AttentionJob& job_, const TreeShape& shape_, int64_t root)
      : job(job_),
        shape(shape_),
        b(root / shape_.chunks / job_.params.kv_heads),
        kv_head(root / shape_.chunks % job_.params.kv_heads) {}
  __device__ __forceinline__ const T* operator()(int32_t j) const {
    return key_row<T>(job, shape.tree.values, b, kv_head, j);
  }
};

// The rows of a list, where they are.
template <class T>
struct ListedRows {
  using Element = T;
  const RowAt<T>& row_at;
  const int32_t* list;
  template <int kEach>
  __device__ __forceinline__ void load(T (&x)[kEach][kChunkRow], const int (&index)[kEach], int at) const {
    const T* row[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) row[i] = row_at(list[index[i]]);
    copy_chunks(x, row, at, row_at.shape.size, row_at.shape.aligned);
  }
};

// Of the rows of a list, which are kept in shared memory, every one, or one in `step` / kDirectionRows.
template <class T>
struct KeptRows {
  using Element = T;
  const T* rows;
  const int32_t* list;
  int width, step;
  template <int kEach>
  __device__ __forceinline__ void load(T (&x)[kEach][kChunkRow], const int (&index)[kEach], int at) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      copy_whole_chunk(x[i], rows + list[static_cast<unsigned>(index[i] * step) / kDirectionRows] * width + at);
  }
};

// Copies rows to shared memory, `width` elements each.
template <int kEach, class Rows>
__device__ __forceinline__ void keep_rows(const Rows& rows, int count, int width, typename Rows::Element* to) {
  using T = typename Rows::Element;
  const Team team = whole_block();
#pragma unroll 1
  for (int base = 0; base < count; base += rows_of_step(team, kEach)) {
    int row[kEach];
    own_rows(row, team, base, count);
#pragma unroll 1
    for (int at = first_chunk(); at < width; at += kPass) {
      __align__(16) T chunk[kEach][kChunkRow];
      rows.load(chunk, row, at);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (base + row_of_step(team, i) < count) copy_whole_chunk(to + row[i] * width + at, chunk[i]);
      }
    }
  }
}

constexpr int kArrayRowsOfWarp = node_array_rows(1);  // so that teams of any size have enough

// Shared memory of a block that divides one list.
struct ListArrays {
  float* directions;              // (warps, kArrayRowsOfWarp, width)
  uint32_t* histogram;            // (warps, kDigits)
  int32_t *list, *side;           // (count): what is divided, and room for a side of it
  uint32_t* key;                  // (count)
  uint32_t *found, *warp_counts;  // (warps, 2), (warps)
};

// Divides list[0 .. count) until every run of `cluster` of its rows is a cluster, the nodes of a level side by side.
// rows_of(list, step): the rows of a list, or one in `step` / kDirectionRows of them.
template <int kEach, class RowsOf>
__device__ __forceinline__ void divide_list(const ListArrays& s, int32_t count, int32_t cluster, int size, int width,
                                            const RowsOf& rows_of) {
  constexpr int kKeysEach = 2;
  const Team block = whole_block();
  for (int i = block.thread; i < block.warps * kDigits; i += block.threads()) s.histogram[i] = 0;
  const int32_t clusters = ceil_div(count, cluster);
  for (int depth = 0; clusters > 1 << depth; ++depth) {
    __syncthreads();
    const int nodes = 1 << depth, warps = max(block.warps >> depth, 1), teams = block.warps / warps;
    const int own = block.warp() / warps, first_warp = own * warps;
    const Team team{block.thread % (warps * kWarp), warps};
    const NodeArrays arrays = node_arrays(s.directions + first_warp * kArrayRowsOfWarp * width, width);
    const TeamPartition shared{s.histogram + own * kDigits, s.found + own * 2, s.warp_counts + first_warp};
    const int32_t most = ceil_div(clusters, nodes) * cluster;
    for (int index = own; index < nodes; index += teams) {
      const TreeNode node = find_node(count, cluster, index, depth);
      int32_t* own_list = s.list + node.first;
      uint32_t* own_key = s.key + node.first;
      const Axis axis =
          node_direction<kEach>(team, rows_of(own_list, max(node.count, kDirectionRows)), min(node.count, kDirectionRows),
                                size, arrays, reinterpret_cast<float*>(own_key));
      project_rows<kEach>(team, rows_of(own_list, kDirectionRows), node.count, arrays, axis, own_key);
      team.sync();
      partition<kKeysEach>(team, own_list, own_key, s.side + node.first, node.count, node.left, most, shared);
    }
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace qexport
