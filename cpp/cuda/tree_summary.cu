// Keys and values in the order of the tree, the moments of every cluster, and the slope of the values along the keys.
#include "node_direction.cuh"
#include "tree.cuh"

namespace qexport {
namespace cuda {
namespace {
constexpr int kMomentThreads = 256;  // of a block that copies a cluster and takes its moments
constexpr int kRowsAtOnce = kMomentThreads / kRowThreads, kMemberEach = kCluster / kRowsAtOnce;
constexpr int kNodeArrayRows = node_array_rows(kMomentThreads / kWarp);

// Up to kCluster rows of K or of V: node.rows points to them, and they are copied to `to`, zeros behind them.
template <class T, class RowOf>
__device__ void copy_rows(const TreeLaunch& tree, bool values, int64_t head, int rows, RowOf row_of_place, T* to,
                          bool aligned, NodeShared<T>& node) {
  const QuantumAttentionParams& p = tree.job.params;
  const int size = static_cast<int>(values ? p.v_head_size : p.head_size), thread = static_cast<int>(threadIdx.x);
  if (thread < rows) {
    node.rows[thread] = key_row<T>(tree.job, values, head / p.kv_heads, head % p.kv_heads, row_of_place(thread));
  }
  __syncthreads();
  for (int i = thread / kRowThreads; i < kCluster; i += kRowsAtOnce) {
    for (int x = first_chunk(); x < size; x += kPass) {
      __align__(16) T chunk[1][kChunkRow] = {};
      if (i < rows) copy_chunks(chunk, {node.rows[i]}, x, size, aligned);
      copy_whole_chunk(to + int64_t{i} * size + x, chunk[0]);
    }
  }
}

// One block of threads for each block of rows that is stored.
template <class T>
__global__ void __launch_bounds__(kMomentThreads)
    store_rows(const __grid_constant__ TreeLaunch tree, bool keys_aligned, bool values_aligned) {
  __shared__ NodeShared<T> node;
  const QuantumAttentionParams& p = tree.job.params;
  const int64_t stored = blockIdx.x, head = stored / tree.stored();
  const int c = static_cast<int>(stored % tree.stored()), d = static_cast<int>(p.head_size);
  const int dv = static_cast<int>(p.v_head_size), width = node_width(max(d, dv));
  T* const keys = static_cast<T*>(tree.keys) + stored * kCluster * d;
  T* const values = static_cast<T*>(tree.values) + stored * kCluster * dv;
  if (c >= tree.clusters) {  // as they come
    const int64_t* nonpad = tree.job.tensors.nonpad_kv_seqlen;
    const int64_t first = (c - tree.clusters) * kCluster, end = nonpad ? nonpad[head / p.kv_heads] : tree.job.total_len;
    const int rows = static_cast<int>(max(int64_t{0}, min(min(end, tree.job.total_len) - first, int64_t{kCluster})));
    const auto natural = [&](int i) { return first + i; };
    copy_rows(tree, false, head, rows, natural, keys, keys_aligned, node);
    __syncthreads();
    return copy_rows(tree, true, head, rows, natural, values, values_aligned, node);
  }
  const int rows = tree.cluster_rows(head, c);
  if (rows == 0) return;  // zeros
  const NodeArrays arrays = node_arrays(dynamic_shared<float>(), width);
  const int64_t at = head * tree.clusters + c;
  const auto member = [&](int i) { return tree.order[at * kCluster + i]; };
  const float share = 1.0f / static_cast<float>(rows);
  copy_rows(tree, false, head, rows, member, keys, keys_aligned, node);
  row_moments<kMemberEach>(whole_block(), PointedRows<T>{node.rows, d, keys_aligned}, rows, arrays);
  for (int x = static_cast<int>(threadIdx.x); x < d; x += kMomentThreads) {
    tree.summary<T>(head, c, kMeanKey, x) = from_float<T>(arrays.mean[x]);
    tree.summary<Variance<T>>(head, c, kVariance, x) = from_float<Variance<T>>(fmaxf(arrays.direction[x] * share, 0.0f));
  }
  __syncthreads();
  copy_rows(tree, true, head, rows, member, values, values_aligned, node);
  row_moments<kMemberEach>(whole_block(), PointedRows<T>{node.rows, dv, values_aligned}, rows, arrays);
  float spread = 0.0f;
  for (int x = static_cast<int>(threadIdx.x); x < dv; x += kMomentThreads) {
    tree.summary<T>(head, c, kMeanValue, x) = from_float<T>(arrays.mean[x]);
    spread += fmaxf(arrays.direction[x] * share, 0.0f);
  }
  spread = block_sum(spread, node.parts);
  if (threadIdx.x == 0) tree.spread[at] = spread;
}

// The clusters whose rows part `part` of the slopes sums over: every `step`-th from `first` to before `end`.
struct SlopeClusters {
  int first, end, step;
};
__device__ SlopeClusters slope_clusters(const TreeLaunch& tree, int64_t head, int part) {
  if (tree.job.params.is_causal) {
    const int first = part * kChunkClusters;
    return {first, min(first + kChunkClusters, static_cast<int>(tree.clusters)), 2};
  }
  const int used = ceil_div(tree.count[head], kCluster), step = max(1, ceil_div(used, kSlopeParts));
  return {part * step, min(part * step + 1, used), 1};
}

// slope_parts = sum of (k - mean k) (v - mean v)' over the rows of a part. Threads compute four by four elements.
template <class T>
__global__ void __launch_bounds__(kSummaryThreads) sum_slope_parts(const __grid_constant__ TreeLaunch tree) {
  constexpr int kSquare = 4;
  const QuantumAttentionParams& p = tree.job.params;
  const int64_t head = blockIdx.x / tree.parts;
  const int d = static_cast<int>(p.head_size), dv = static_cast<int>(p.v_head_size);
  float* const sum = tree.slope_parts + int64_t{blockIdx.x} * d * dv;
  float* const k = dynamic_shared<float>();  // (kCluster, d), (kCluster, dv)
  float* const v = k + kCluster * d;
  const SlopeClusters part = slope_clusters(tree, head, static_cast<int>(blockIdx.x % tree.parts));
  bool started = false;
  for (int c = part.first; c < part.end; c += part.step) {
    const int rows = tree.cluster_rows(head, c);
    if (rows == 0) continue;
    const int64_t stored = head * tree.stored() + c;
    const T* const keys = static_cast<const T*>(tree.keys) + stored * kCluster * d;
    const T* const values = static_cast<const T*>(tree.values) + stored * kCluster * dv;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < rows * d; i += kSummaryThreads) {
      k[i] = to_float(keys[i]) - to_float(tree.summary<T>(head, c, kMeanKey, i % d));
    }
    for (int i = static_cast<int>(threadIdx.x); i < rows * dv; i += kSummaryThreads) {
      v[i] = to_float(values[i]) - to_float(tree.summary<T>(head, c, kMeanValue, i % dv));
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < d * dv / (kSquare * kSquare); i += kSummaryThreads) {
      const int x = i / (dv / kSquare) * kSquare, y = i % (dv / kSquare) * kSquare;
      float square[kSquare][kSquare] = {};
      for (int r = 0; r < rows; ++r) {
        const float4 a = *reinterpret_cast<const float4*>(k + r * d + x),
                     b = *reinterpret_cast<const float4*>(v + r * dv + y);
        const float left[kSquare] = {a.x, a.y, a.z, a.w}, right[kSquare] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int e = 0; e < kSquare; ++e) {
#pragma unroll
          for (int f = 0; f < kSquare; ++f) square[e][f] = fmaf(left[e], right[f], square[e][f]);
        }
      }
#pragma unroll
      for (int e = 0; e < kSquare; ++e) {
#pragma unroll
        for (int f = 0; f < kSquare; ++f) {
          float* const to = sum + (x + e) * dv + y + f;
          *to = started ? *to + square[e][f] : square[e][f];
        }
      }
    }
    started = true;
  }
  if (started) return;
  for (int i = static_cast<int>(threadIdx.x); i < d * dv; i += kSummaryThreads) sum[i] = 0.0f;
}

// The slope of a head; under a causal mask one for each chunk, from the parts before it.
template <class T>
__global__ void __launch_bounds__(kSummaryThreads) mean_slopes(const __grid_constant__ TreeLaunch tree) {
  const QuantumAttentionParams& p = tree.job.params;
  const int64_t elements = p.head_size * p.v_head_size, blocks = ceil_div<int64_t>(elements, kSummaryThreads);
  const int64_t head = blockIdx.x / blocks, element = blockIdx.x % blocks * kSummaryThreads + threadIdx.x;
  if (element >= elements) return;
  T* const slopes = static_cast<T*>(tree.slopes) + head * (p.is_causal ? tree.chunks : 1) * elements + element;
  // Kept within float16, or far from the end of float32: an infinite slope would make NaN of every row.
  const auto mean = [](float sum, int64_t keys) {
    constexpr float kMost = sizeof(T) == 4 ? 0x1p100f : kMostHalf;
    return keys ? from_float<T>(fmaxf(fminf(sum / static_cast<float>(keys), kMost), -kMost)) : from_float<T>(0.0f);
  };
  float sum = 0.0f;
  int64_t keys = 0;
  for (int part = 0; part < tree.parts; ++part) {
    if (p.is_causal) slopes[part * elements] = mean(sum, keys);
    const SlopeClusters clusters = slope_clusters(tree, head, part);
    for (int c = clusters.first; c < clusters.end; c += clusters.step) keys += tree.cluster_rows(head, c);
    sum += tree.slope_parts[(head * tree.parts + part) * elements + element];
  }
  if (!p.is_causal) *slopes = mean(sum, keys);
}

template <class T>
void summarise(Status& status, const TreeLaunch& tree, void* stream) {
  const QuantumAttentionParams& p = tree.job.params;
  const QuantumAttentionTensors& t = tree.job.tensors;
  const auto aligned = [&](const HeadRows& rows, const HeadRows& past) {
    return starts_on_16_bytes(rows, sizeof(T)) && (p.past_len == 0 || starts_on_16_bytes(past, sizeof(T)));
  };
  const int64_t size = p.head_size + p.v_head_size, elements = p.head_size * p.v_head_size;
  const size_t arrays =
      sizeof(float) * kNodeArrayRows * node_width(p.head_size > p.v_head_size ? p.head_size : p.v_head_size);
  if (status.ok()) fill_zero(status, tree.summaries, static_cast<size_t>(tree.summary_bytes()), stream);
  launch(status, store_rows<T>, dim3(static_cast<unsigned>(tree.heads() * tree.stored())), kMomentThreads, arrays, stream,
         tree, aligned(t.k, t.past_key), aligned(t.v, t.past_value));
  launch(status, sum_slope_parts<T>, dim3(static_cast<unsigned>(tree.heads() * tree.parts)), kSummaryThreads,
         sizeof(float) * kCluster * size, stream, tree);
  launch(status, mean_slopes<T>, dim3(static_cast<unsigned>(tree.heads() * ceil_div<int64_t>(elements, kSummaryThreads))),
         kSummaryThreads, 0, stream, tree);
}

}  // namespace

void summarise_clusters(Status& status, const TreeLaunch& tree, void* stream) {
  visit_type(tree.job.params.type, [&](auto element) { summarise<decltype(element)>(status, tree, stream); });
}

}  // namespace cuda
}  // namespace qexport
