// Keys and values in the order of the tree, the moments of every cluster, and the slope of the values along the keys.
#include "node_direction.cuh"
#include "tree.cuh"

namespace qexport {
namespace cuda {
namespace {

// The rows of one cluster, from K or from V: copied to `to`, and their moments to `arrays`.
template <class T>
__device__ void gather_rows(const TreeLaunch& launch, bool values, int64_t head, const int32_t* members, int rows, T* to,
                            bool aligned, NodeShared<T>& node, const NodeArrays& arrays, int width) {
  const QuantumAttentionParams& p = launch.job.params;
  const int size = static_cast<int>(values ? p.v_head_size : p.head_size), thread = static_cast<int>(threadIdx.x);
  if (thread < kCluster) {
    const int32_t j = members[min(thread, rows - 1)];
    node.rows[thread] = key_row<T>(launch.job, values, head / p.kv_heads, head % p.kv_heads, j);
  }
  __syncthreads();
  for (int i = thread / kRowThreads; i < kCluster; i += kRowsAtOnce) {
    for (int x = thread % kRowThreads * kChunkRow; x < size; x += kPass) {
      float chunk[kChunkRow] = {};
      if (i < rows) load_chunk(chunk, node.rows[i], x, size, aligned);
      __align__(16) T stored[kChunkRow];
#pragma unroll
      for (int e = 0; e < kChunkRow; ++e) stored[e] = from_float<T>(chunk[e]);
      *reinterpret_cast<uint4*>(to + int64_t{i} * size + x) = *reinterpret_cast<const uint4*>(stored);
    }
  }
  row_moments(node, arrays, rows, size, width, aligned);
}

template <class T>
__global__ void __launch_bounds__(kNodeThreads)
    gather_clusters(const __grid_constant__ TreeLaunch launch, bool keys_aligned, bool values_aligned) {
  __shared__ NodeShared<T> node;
  const QuantumAttentionParams& p = launch.job.params;
  const int64_t at = blockIdx.x, head = at / launch.clusters;
  const int rows = launch.cluster_rows(head, static_cast<int>(at % launch.clusters));
  if (rows == 0) return;  // nobody reads it
  const int d = static_cast<int>(p.head_size), dv = static_cast<int>(p.v_head_size), width = node_width(max(d, dv));
  const NodeArrays arrays = node_arrays(dynamic_shared<float>(), width);
  const int32_t* members = launch.order + at * kCluster;
  const float share = 1.0f / static_cast<float>(rows);
  gather_rows(launch, false, head, members, rows, static_cast<T*>(launch.keys) + at * kCluster * d, keys_aligned, node,
              arrays, width);
  for (int x = static_cast<int>(threadIdx.x); x < d; x += kNodeThreads) {
    static_cast<T*>(launch.mean_key)[at * d + x] = from_float<T>(arrays.mean[x]);
    launch.variance[at * d + x] = from_float<__nv_bfloat16>(fmaxf(arrays.direction[x] * share, 0.0f));
  }
  __syncthreads();
  gather_rows(launch, true, head, members, rows, static_cast<T*>(launch.values) + at * kCluster * dv, values_aligned, node,
              arrays, width);
  float spread = 0.0f;
  for (int x = static_cast<int>(threadIdx.x); x < dv; x += kNodeThreads) {
    static_cast<T*>(launch.mean_value)[at * dv + x] = from_float<T>(arrays.mean[x]);
    spread += fmaxf(arrays.direction[x] * share, 0.0f);
  }
  spread = block_sum(spread, node.parts);
  if (threadIdx.x == 0) launch.spread[at] = spread;
}

// The clusters whose rows part `part` of the slopes sums over: every `step`-th from `first` to before `end`.
struct SlopeClusters {
  int first, end, step;
};
__device__ SlopeClusters slope_clusters(const TreeLaunch& launch, int64_t head, int part) {
  if (launch.job.params.is_causal) {
    const int first = part * kChunkClusters;
    return {first, min(first + kChunkClusters, static_cast<int>(launch.clusters)), 2};
  }
  const int used = ceil_div(launch.count[head], kCluster), step = max(1, ceil_div(used, kSlopeParts));
  return {part * step, min(part * step + 1, used), 1};
}

// slope_parts = sum of (k - mean k) (v - mean v)' over the rows of a part. Threads compute four by four elements.
template <class T>
__global__ void __launch_bounds__(kSummaryThreads) sum_slope_parts(const __grid_constant__ TreeLaunch launch) {
  constexpr int kSquare = 4;
  const QuantumAttentionParams& p = launch.job.params;
  const int64_t head = blockIdx.x / launch.parts;
  const int d = static_cast<int>(p.head_size), dv = static_cast<int>(p.v_head_size);
  float* const sum = launch.slope_parts + int64_t{blockIdx.x} * d * dv;
  float* const k = dynamic_shared<float>();  // (kCluster, d), (kCluster, dv)
  float* const v = k + kCluster * d;
  const SlopeClusters part = slope_clusters(launch, head, static_cast<int>(blockIdx.x % launch.parts));
  bool started = false;
  for (int c = part.first; c < part.end; c += part.step) {
    const int rows = launch.cluster_rows(head, c);
    if (rows == 0) continue;
    const int64_t at = head * launch.clusters + c;
    const T *keys = static_cast<const T*>(launch.keys) + at * kCluster * d,
            *mean_key = static_cast<const T*>(launch.mean_key) + at * d;
    const T *values = static_cast<const T*>(launch.values) + at * kCluster * dv,
            *mean_value = static_cast<const T*>(launch.mean_value) + at * dv;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < rows * d; i += kSummaryThreads) {
      k[i] = to_float(keys[i]) - to_float(mean_key[i % d]);
    }
    for (int i = static_cast<int>(threadIdx.x); i < rows * dv; i += kSummaryThreads) {
      v[i] = to_float(values[i]) - to_float(mean_value[i % dv]);
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
__global__ void __launch_bounds__(kSummaryThreads) mean_slopes(const __grid_constant__ TreeLaunch launch) {
  const QuantumAttentionParams& p = launch.job.params;
  const int64_t elements = p.head_size * p.v_head_size, blocks = ceil_div<int64_t>(elements, kSummaryThreads);
  const int64_t head = blockIdx.x / blocks, element = blockIdx.x % blocks * kSummaryThreads + threadIdx.x;
  if (element >= elements) return;
  T* const slopes = static_cast<T*>(launch.slopes) + head * (p.is_causal ? launch.chunks : 1) * elements + element;
  float sum = 0.0f;
  int64_t keys = 0;
  for (int part = 0; part < launch.parts; ++part) {
    if (p.is_causal) slopes[part * elements] = from_float<T>(keys ? sum / static_cast<float>(keys) : 0.0f);
    const SlopeClusters clusters = slope_clusters(launch, head, part);
    for (int c = clusters.first; c < clusters.end; c += clusters.step) keys += launch.cluster_rows(head, c);
    sum += launch.slope_parts[(head * launch.parts + part) * elements + element];
  }
  if (!p.is_causal) *slopes = from_float<T>(keys ? sum / static_cast<float>(keys) : 0.0f);
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
  launch(status, gather_clusters<T>, dim3(static_cast<unsigned>(tree.heads() * tree.clusters)), kNodeThreads, arrays, stream,
         tree, aligned(t.k, t.past_key), aligned(t.v, t.past_value));
  launch(status, sum_slope_parts<T>, dim3(static_cast<unsigned>(tree.heads() * tree.parts)), kSummaryThreads,
         sizeof(float) * kCluster * size, stream, tree);
  launch(status, mean_slopes<T>, dim3(static_cast<unsigned>(tree.heads() * ceil_div<int64_t>(elements, kSummaryThreads))),
         kSummaryThreads, 0, stream, tree);
}

}  // namespace

void summarise_clusters(Status& status, const TreeLaunch& tree, void* stream) {
  if (tree.job.params.type == DType::f16) return summarise<__half>(status, tree, stream);
  summarise<__nv_bfloat16>(status, tree, stream);
}

}  // namespace cuda
}  // namespace qexport
