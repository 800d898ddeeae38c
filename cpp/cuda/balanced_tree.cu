// Level by level: the rows of large nodes are projected by many blocks and divided by one. What is below a node whose rows
// fit the shared memory of a block is divided by that block alone, the nodes of a level side by side.
#include <algorithm>

#include "balanced_nodes.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kNodeThreads = 512, kNodeWarps = kNodeThreads / kWarp;  // at most
constexpr int kPartitionThreads = 1024;
constexpr int kSubtreeRows = 1024;
// What a thread has on the way at once: keys in global memory, which is far, and rows in shared and in global memory.
constexpr int kFarKeysEach = 8;
template <class T>
constexpr int kRowsEach = 8 / sizeof(T);
template <class T>
constexpr int kFarRowsEach = 16 / sizeof(T);
constexpr int kFewestProjected = 512;  // rows of a large node, by one block, which also finds where the node is long

int subtree_warps(int64_t rows) { return rows > kSubtreeRows / 2 ? kNodeWarps : kNodeWarps / 2; }

// Shared memory for a subtree: what directions and partitions need, the rows, their numbers, keys, and the list that is
// divided, with room for a side of it.
size_t subtree_bytes(int width, int64_t rows, int64_t element) {
  const int64_t warp = kArrayRowsOfWarp * width + kDigits;
  return static_cast<size_t>(subtree_warps(rows) * warp * 4 + rows * (width * element + 16));
}

TreeShape shape_of(Status& status, const AttentionJob& job, const BalancedTree& tree) {
  const QuantumAttentionParams& p = job.params;
  const QuantumAttentionTensors& t = job.tensors;
  const int64_t chunks = tree_chunks(job, tree), size = tree.values ? p.v_head_size : p.head_size;
  const int64_t element = p.type == DType::f32 ? 4 : 2;
  const bool aligned = starts_on_16_bytes(tree.values ? t.v : t.k, element) &&
                       (p.past_len == 0 || starts_on_16_bytes(tree.values ? t.past_value : t.past_key, element));
  const int width = node_width(size);
  constexpr int kStatic = 1024;  // of the kernel that divides subtrees, at most
  const Device device = current_device(status);
  const int room = std::max(device.shared_bytes - kStatic, 0);
  int32_t subtree = kSubtreeRows;
  while (subtree > 0 && subtree_bytes(width, subtree, element) > static_cast<size_t>(room)) subtree /= 2;
  return {tree,
          chunks,
          chunks > 0 ? tree_places(job, tree) / chunks : 0,
          static_cast<int>(size),
          width,
          aligned,
          device.multiprocessors,
          subtree};
}

// The first order: the rows that take part, as they come. `parts` blocks of a root; one if there is a mask.
__global__ void __launch_bounds__(kPartitionThreads)
    start_order(AttentionJob job, TreeShape shape, int64_t parts, int32_t* order, int32_t* count) {
  __shared__ uint32_t warp_counts[kWarp];
  const int64_t root = blockIdx.x / parts, b = root / shape.chunks / job.params.kv_heads;
  const int64_t begin = root % shape.chunks * shape.tree.chunk;
  int64_t end = min(begin + min(shape.tree.chunk, job.total_len), job.total_len);
  if (job.tensors.nonpad_kv_seqlen) end = min(end, job.tensors.nonpad_kv_seqlen[b]);
  int32_t* list = order + shape.first_place(root);
  const Team team = whole_block();
  constexpr int kEach = kFarKeysEach;
  if (shape.tree.masked && job.tensors.mask.data) {
    const AttentionMask& mask = job.tensors.mask;
    end = min(end, mask.len);
    int32_t kept = 0;
    for (int64_t base = begin; base < end; base += kEach * kPartitionThreads) {
      bool keep[kEach], none[kEach] = {};
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int64_t j = base + entry_of<kEach>(team, e);
        keep[e] = j < end && mask_bias(mask, b, 0, 0, j) == 0.0f;
      }
      const EachRanks<kEach> ranks = rank_in_team(team, keep, none, warp_counts);
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (keep[e]) list[kept + ranks.before[0][e]] = static_cast<int32_t>(base + entry_of<kEach>(team, e));
      }
      kept += ranks.all[0];
      __syncthreads();
    }
    for (int64_t i = kept + team.thread; i < shape.chunk_places; i += kPartitionThreads) list[i] = -1;
    if (team.thread == 0) count[root] = kept;
  } else {
    const int64_t kept = max(end - begin, int64_t{0}), first = blockIdx.x % parts * kPartitionThreads + team.thread;
    for (int64_t i = first; i < shape.chunk_places; i += parts * kPartitionThreads) {
      list[i] = i < kept ? static_cast<int32_t>(begin + i) : -1;
    }
    if (first == 0) count[root] = static_cast<int32_t>(kept);
  }
}

// The keys of `projected` rows of a node by each of `parts` blocks, all of which find the same direction.
template <class T>
__global__ void __launch_bounds__(kNodeThreads)
    project_nodes(AttentionJob job, TreeShape shape, const int32_t* order, const int32_t* count, int level, int64_t parts,
                  int32_t projected, uint32_t* key) {
  __shared__ NodeShared<T> shared;
  const NodePlace place = find_place(shape, count, blockIdx.x / parts, level);
  const TreeNode& node = place.node;
  const int64_t first = blockIdx.x % parts * projected;
  if (node.left == 0 || first >= node.count) return;
  const Team team = whole_block();
  const RowAt<T> row_at(job, shape, place.root);
  const int32_t* list = order + place.at;
  const int some = min(node.count, kDirectionRows);
  for (int i = team.thread; i < some; i += team.threads()) {
    shared.rows[i] = row_at(list[node.count > some ? int64_t{i} * node.count / kDirectionRows : i]);
  }
  __syncthreads();
  const NodeArrays arrays = node_arrays(dynamic_shared<float>(), shape.width);
  const Axis axis = node_direction<kRowsEach<T>>(team, PointedRows<T>{shared.rows, shape.size, shape.aligned}, some,
                                                 shape.size, arrays, shared.t);
  project_rows<kFarRowsEach<T>>(team, ListedRows<T>{row_at, list + first},
                                static_cast<int>(min(int64_t{projected}, node.count - first)), arrays, axis,
                                key + place.at + first);
}

__global__ void __launch_bounds__(kPartitionThreads)
    partition_nodes(TreeShape shape, int32_t* order, const int32_t* count, int level, const uint32_t* key, int32_t* side) {
  __shared__ PartitionShared shared;
  const NodePlace place = find_place(shape, count, blockIdx.x, level);
  const TreeNode& node = place.node;
  if (node.left == 0) return;
  for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kPartitionThreads) shared.histogram[i] = 0;
  __syncthreads();
  partition<kFarKeysEach>(whole_block(), order + place.at, key + place.at, side + place.at, node.count, node.left,
                          node.count, {shared.histogram, shared.found, shared.warp});
}

// All levels below the nodes of a level, of up to `room` rows, which a block keeps in shared memory.
template <class T>
__global__ void __launch_bounds__(kNodeThreads)
    divide_subtrees(AttentionJob job, TreeShape shape, int32_t* order, const int32_t* count, int level, int32_t room) {
  __shared__ uint32_t found[kNodeWarps * 2], warp_counts[kNodeWarps];
  const NodePlace place = find_place(shape, count, blockIdx.x, level);
  const TreeNode& top = place.node;
  if (top.left == 0) return;
  const Team block = whole_block();
  const int width = shape.width;
  float* memory = dynamic_shared<float>();
  uint32_t* histogram = reinterpret_cast<uint32_t*>(memory + block.warps * kArrayRowsOfWarp * width);
  T* rows = reinterpret_cast<T*>(histogram + block.warps * kDigits);
  int32_t* number = reinterpret_cast<int32_t*>(rows + int64_t{room} * width);
  int32_t *list = number + room, *side = list + room;
  uint32_t* key = reinterpret_cast<uint32_t*>(side + room);

  const RowAt<T> row_at(job, shape, place.root);
  for (int i = block.thread; i < top.count; i += block.threads()) number[i] = order[place.at + i], list[i] = i;
  __syncthreads();
  keep_rows<kFarRowsEach<T>>(ListedRows<T>{row_at, number}, top.count, width, rows);

  divide_list<kRowsEach<T>>({memory, histogram, list, side, key, found, warp_counts}, top.count,
                            static_cast<int32_t>(shape.tree.cluster), shape.size, width,
                            [&](const int32_t* some, int step) { return KeptRows<T>{rows, some, width, step}; });
  for (int i = block.thread; i < top.count; i += block.threads()) order[place.at + i] = number[list[i]];
}

int64_t roots_of(const AttentionJob& job, const TreeShape& shape) {
  return job.params.batch * job.params.kv_heads * shape.chunks;
}

// Rows of the largest node of a level.
int64_t largest_node(const TreeShape& shape, int level) {
  return ceil_div(shape.chunk_places / shape.tree.cluster, int64_t{1} << level) * shape.tree.cluster;
}

struct Scratch {
  uint32_t* key;  // (roots, chunk_places) each
  int32_t* side;
  size_t bytes;
};
// Nothing is needed where subtrees are all there is.
Scratch scratch_of(const AttentionJob& job, const TreeShape& shape, void* memory) {
  const int64_t places = largest_node(shape, 0) > shape.subtree ? roots_of(job, shape) * shape.chunk_places : 0;
  uint32_t* key = static_cast<uint32_t*>(memory);
  return {key, reinterpret_cast<int32_t*>(key + places), static_cast<size_t>(8 * places)};
}

// The most warps whose directions have room in what any device gives.
int project_warps(const TreeShape& shape) {
  int warps = kNodeWarps;
  while (warps > 1 && node_array_rows(warps) * shape.width * 4 > 32 * 1024) warps /= 2;
  return warps;
}

template <class T>
void build(Status& status, const AttentionJob& job, const TreeShape& shape, int32_t* order, int32_t* count, const Scratch& s,
           void* stream) {
  const int64_t roots = roots_of(job, shape), cluster = shape.tree.cluster;
  const bool masked = shape.tree.masked && job.tensors.mask.data;
  const int64_t starts = masked ? 1 : ceil_div(shape.chunk_places, int64_t{kPartitionThreads} * kFarKeysEach);
  launch(status, start_order, dim3(static_cast<unsigned>(roots * starts)), kPartitionThreads, 0, stream, job, shape, starts,
         order, count);

  // One block for each multiprocessor.
  const int64_t share = ceil_div(roots * shape.chunk_places, int64_t{shape.multiprocessors});
  const int64_t projected = ceil_div(share, int64_t{kFewestProjected}) * kFewestProjected;
  const int warps = project_warps(shape);
  const size_t directions = static_cast<size_t>(node_array_rows(warps) * shape.width) * sizeof(float);
  int level = 0;
  for (; largest_node(shape, level) > std::max<int64_t>(shape.subtree, cluster); ++level) {
    const int64_t nodes = roots << level, parts = ceil_div(largest_node(shape, level), projected);
    launch(status, project_nodes<T>, dim3(static_cast<unsigned>(nodes * parts)), warps * kWarp, directions, stream, job,
           shape, order, count, level, parts, projected, s.key);
    launch(status, partition_nodes, dim3(static_cast<unsigned>(nodes)), kPartitionThreads, 0, stream, shape, order, count,
           level, s.key, s.side);
  }
  const int64_t room = largest_node(shape, level);
  if (room <= cluster) return;
  launch(status, divide_subtrees<T>, dim3(static_cast<unsigned>(roots << level)), subtree_warps(room) * kWarp,
         subtree_bytes(shape.width, room, sizeof(T)), stream, job, shape, order, count, level, room);
}

}  // namespace

void balanced_tree(Status& status, const AttentionJob& job, const BalancedTree& tree, int32_t* order, int32_t* count,
                   void* scratch, void* stream) {
  const TreeShape shape = shape_of(status, job, tree);
  const Scratch s = scratch_of(job, shape, scratch);
  visit_type(job.params.type, [&](auto element) { build<decltype(element)>(status, job, shape, order, count, s, stream); });
}

size_t balanced_tree_scratch_bytes(const AttentionJob& job, const BalancedTree& tree) {
  Status status;
  return scratch_of(job, shape_of(status, job, tree), nullptr).bytes;
}

}  // namespace cuda
}  // namespace qexport
