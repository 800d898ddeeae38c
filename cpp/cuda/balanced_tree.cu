// Level by level: every node of a level is divided by one block, or, where nodes are large, its rows are projected by many.
#include "balanced_tree.cuh"
#include "node_direction.cuh"
#include "partition.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int32_t kSmallNode = 4096;  // rows of a node that one block projects and divides
constexpr int kProjectedRows = 512;   // of a larger node, by one block
constexpr int kPartitionThreads = 1024;

// A root is one chunk of one (batch, kv head).
struct Shape {
  BalancedTree tree;
  int64_t chunks, chunk_places;
  int size, width;  // elements of a row, and rounded up
  bool aligned;
  __device__ __forceinline__ int64_t first_place(int64_t root) const { return root * chunk_places; }
};

Shape shape_of(const AttentionJob& job, const BalancedTree& tree) {
  const QuantumAttentionParams& p = job.params;
  const QuantumAttentionTensors& t = job.tensors;
  const int64_t chunks = tree_chunks(job, tree), size = tree.values ? p.v_head_size : p.head_size;
  const int64_t element = p.type == DType::f32 ? 4 : 2;
  const bool aligned = starts_on_16_bytes(tree.values ? t.v : t.k, element) &&
                       (p.past_len == 0 || starts_on_16_bytes(tree.values ? t.past_value : t.past_key, element));
  return {tree, chunks, chunks > 0 ? tree_places(job, tree) / chunks : 0, static_cast<int>(size), node_width(size), aligned};
}

struct Node {
  int64_t root, first, count, left;  // places of the root [first, first + count), of which `left` go to the first half
};

// Node `index` of a level; left is 0 where there is nothing to divide.
__device__ Node find_node(const Shape& shape, const int32_t* count, int64_t index, int level) {
  Node node{index >> level, 0, 0, 0};
  node.count = count[node.root];
  for (int bit = level; bit >= 0; --bit) {
    if (node.count <= shape.tree.cluster) return {node.root, 0, 0, 0};
    node.left = (ceil_div(node.count, shape.tree.cluster) + 1) / 2 * shape.tree.cluster;
    if (bit == 0) break;
    if (index >> (bit - 1) & 1) {
      node.first += node.left, node.count -= node.left;
    } else {
      node.count = node.left;
    }
  }
  return node;
}

// The first order: the rows that take part, as they come.
__global__ void __launch_bounds__(kPartitionThreads)
    start_order(AttentionJob job, Shape shape, int32_t* order, int32_t* count) {
  __shared__ uint32_t warp_counts[kWarp];
  const int64_t root = blockIdx.x, b = root / shape.chunks / job.params.kv_heads;
  const int64_t begin = root % shape.chunks * shape.tree.chunk;
  int64_t end = min(begin + min(shape.tree.chunk, job.total_len), job.total_len);
  if (job.tensors.nonpad_kv_seqlen) end = min(end, job.tensors.nonpad_kv_seqlen[b]);
  const AttentionMask& mask = job.tensors.mask;
  const bool masked = shape.tree.masked && mask.data;
  if (masked) end = min(end, mask.len);
  int32_t* list = order + shape.first_place(root);
  int32_t kept = 0;
  for (int64_t base = begin; base < end; base += blockDim.x) {
    const int64_t j = base + threadIdx.x;
    const bool keep = j < end && (!masked || mask_bias(mask, b, 0, 0, j) == 0.0f);
    const Ranks ranks = rank_in_block(keep, false, warp_counts);
    if (keep) list[kept + ranks.before[0]] = static_cast<int32_t>(j);
    kept += ranks.all[0];
    __syncthreads();
  }
  for (int64_t i = kept + threadIdx.x; i < shape.chunk_places; i += blockDim.x) list[i] = -1;
  if (threadIdx.x == 0) count[root] = kept;
}

template <class T>
struct RowAt {
  const AttentionJob& job;
  const Shape& shape;
  int64_t b, kv_head;
  __device__ __forceinline__ RowAt(const AttentionJob& job_, const Shape& shape_, int64_t root)
      : job(job_),
        shape(shape_),
        b(root / shape_.chunks / job_.params.kv_heads),
        kv_head(root / shape_.chunks % job_.params.kv_heads) {}
  __device__ __forceinline__ const T* operator()(int32_t j) const {
    return key_row<T>(job, shape.tree.values, b, kv_head, j);
  }
};

// key[i] = the projection of row list[i] of [first, end) in an order of integers.
template <class T>
__device__ void project_rows(const RowAt<T>& row_at, const NodeArrays& arrays, const Shape& shape, const int32_t* list,
                             int64_t first, int64_t end, uint32_t* key) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t base = first; base < end; base += kRowsAtOnce) {
    const int64_t i = base + thread / kRowThreads;
    const T* row = row_at(list[i < end ? i : first]);
    const float t = project(row, arrays, shape.size, shape.width, shape.aligned, i < end);
    if (i < end && thread % kRowThreads == 0) key[i] = ordered_bits(t);
  }
}

// Divides the small nodes of a level, of up to `room` rows.
template <class T>
__global__ void __launch_bounds__(kNodeThreads)
    divide_nodes(AttentionJob job, Shape shape, int32_t* order, const int32_t* count, int level, int32_t room) {
  __shared__ NodeShared<T> shared;
  __shared__ PartitionShared partition_shared;
  const Node node = find_node(shape, count, blockIdx.x, level);
  if (node.left == 0 || node.count > kSmallNode) return;
  const NodeArrays arrays = node_arrays(dynamic_shared<float>(), shape.width);
  uint32_t* key = reinterpret_cast<uint32_t*>(arrays.mean + kNodeArrayRows * shape.width);
  int32_t* side = reinterpret_cast<int32_t*>(key + room);
  int32_t* list = order + shape.first_place(node.root) + node.first;
  const RowAt<T> row_at(job, shape, node.root);
  node_direction(shared, arrays, node.count, shape.size, shape.aligned, shape.width,
                 [&](int64_t i) { return row_at(list[i]); });
  project_rows(row_at, arrays, shape, list, 0, node.count, key);
  __syncthreads();
  partition(list, key, side, static_cast<int32_t>(node.count), static_cast<int32_t>(node.left), partition_shared);
}

// A large node in three steps. axis: (nodes, 2, width), mean and direction of each.
template <class T>
__global__ void __launch_bounds__(kNodeThreads)
    direct_nodes(AttentionJob job, Shape shape, const int32_t* order, const int32_t* count, int level, float* axis) {
  __shared__ NodeShared<T> shared;
  const Node node = find_node(shape, count, blockIdx.x, level);
  if (node.count <= kSmallNode) return;
  const NodeArrays arrays = node_arrays(dynamic_shared<float>(), shape.width);
  const int32_t* list = order + shape.first_place(node.root) + node.first;
  const RowAt<T> row_at(job, shape, node.root);
  node_direction(shared, arrays, node.count, shape.size, shape.aligned, shape.width,
                 [&](int64_t i) { return row_at(list[i]); });
  for (int x = static_cast<int>(threadIdx.x); x < 2 * shape.width; x += kNodeThreads)
    axis[blockIdx.x * 2 * shape.width + x] = arrays.mean[x];
}

template <class T>
__global__ void __launch_bounds__(kNodeThreads)
    project_nodes(AttentionJob job, Shape shape, const int32_t* order, const int32_t* count, int level, const float* axis,
                  int64_t parts, uint32_t* key) {
  const int64_t index = blockIdx.x / parts, first = blockIdx.x % parts * kProjectedRows;
  const Node node = find_node(shape, count, index, level);
  if (node.count <= kSmallNode || first >= node.count) return;
  const NodeArrays arrays = node_arrays(dynamic_shared<float>(), shape.width);
  for (int x = static_cast<int>(threadIdx.x); x < 2 * shape.width; x += kNodeThreads)
    arrays.mean[x] = axis[index * 2 * shape.width + x];
  __syncthreads();
  const int64_t at = shape.first_place(node.root) + node.first;
  project_rows(RowAt<T>(job, shape, node.root), arrays, shape, order + at, first,
               min(first + int64_t{kProjectedRows}, node.count), key + at);
}

__global__ void __launch_bounds__(kPartitionThreads)
    partition_nodes(Shape shape, int32_t* order, const int32_t* count, int level, const uint32_t* key, int32_t* side) {
  __shared__ PartitionShared shared;
  const Node node = find_node(shape, count, blockIdx.x, level);
  if (node.count <= kSmallNode) return;
  const int64_t at = shape.first_place(node.root) + node.first;
  partition(order + at, key + at, side + at, static_cast<int32_t>(node.count), static_cast<int32_t>(node.left), shared);
}

int64_t roots_of(const AttentionJob& job, const Shape& shape) {
  return job.params.batch * job.params.kv_heads * shape.chunks;
}

// Rows of the largest node of a level.
int64_t largest_node(const Shape& shape, int level) {
  return ceil_div(shape.chunk_places / shape.tree.cluster, int64_t{1} << level) * shape.tree.cluster;
}

struct Scratch {
  uint32_t* key;  // (roots, chunk_places) each
  int32_t* side;
  float* axis;
  size_t bytes;
};
// Nothing is needed where all nodes are small.
Scratch scratch_of(const AttentionJob& job, const Shape& shape, void* memory) {
  int64_t nodes = roots_of(job, shape), large = 0;
  for (int level = 0; largest_node(shape, level) > kSmallNode; ++level, nodes *= 2) large = nodes;
  const int64_t places = large > 0 ? roots_of(job, shape) * shape.chunk_places : 0;
  uint32_t* key = static_cast<uint32_t*>(memory);
  return {key, reinterpret_cast<int32_t*>(key + places), reinterpret_cast<float*>(key + 2 * places),
          static_cast<size_t>(8 * places + 8 * large * shape.width)};
}

template <class T>
void build(Status& status, const AttentionJob& job, const Shape& shape, int32_t* order, int32_t* count, const Scratch& s,
           void* stream) {
  const size_t arrays = static_cast<size_t>(kNodeArrayRows * shape.width) * sizeof(float);
  const int64_t roots = roots_of(job, shape);
  launch(status, start_order, dim3(static_cast<unsigned>(roots)), kPartitionThreads, 0, stream, job, shape, order, count);
  for (int level = 0; largest_node(shape, level) > shape.tree.cluster; ++level) {
    const int64_t nodes = roots << level, largest = largest_node(shape, level);
    const dim3 grid(static_cast<unsigned>(nodes));
    if (largest > kSmallNode) {
      const int64_t parts = ceil_div(largest, int64_t{kProjectedRows});
      launch(status, direct_nodes<T>, grid, kNodeThreads, arrays, stream, job, shape, order, count, level, s.axis);
      launch(status, project_nodes<T>, dim3(static_cast<unsigned>(nodes * parts)), kNodeThreads, arrays, stream, job, shape,
             order, count, level, s.axis, parts, s.key);
      launch(status, partition_nodes, grid, kPartitionThreads, 0, stream, shape, order, count, level, s.key, s.side);
    }
    // Nodes of a level differ by one cluster, and by what padding leaves of them.
    const int64_t room = largest < kSmallNode ? largest : kSmallNode;
    launch(status, divide_nodes<T>, grid, kNodeThreads, arrays + static_cast<size_t>(room + room / 2 + 1) * 4, stream, job,
           shape, order, count, level, room);
  }
}

}  // namespace

void balanced_tree(Status& status, const AttentionJob& job, const BalancedTree& tree, int32_t* order, int32_t* count,
                   void* scratch, void* stream) {
  const Shape shape = shape_of(job, tree);
  const Scratch s = scratch_of(job, shape, scratch);
  switch (job.params.type) {
    case DType::f16:
      return build<__half>(status, job, shape, order, count, s, stream);
    case DType::bf16:
      return build<__nv_bfloat16>(status, job, shape, order, count, s, stream);
    default:
      return build<float>(status, job, shape, order, count, s, stream);
  }
}

size_t balanced_tree_scratch_bytes(const AttentionJob& job, const BalancedTree& tree) {
  return scratch_of(job, shape_of(job, tree), nullptr).bytes;
}

}  // namespace cuda
}  // namespace qexport
