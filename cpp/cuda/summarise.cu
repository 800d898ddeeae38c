// Keeps the state `key_summary` up to date (docs/math.md, "Decoding from a summary of the cache"): a chunk that is full gets
// clusters, by the balanced tree, and their means.
#include <algorithm>

#include "balanced_nodes.cuh"
#include "tree_decode.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kUpdateThreads = 256, kUpdateWarps = kUpdateThreads / kWarp;
constexpr int kKeys = static_cast<int>(kChunkKeys), kMembers = static_cast<int>(kClusterKeys);
constexpr int kClusters = static_cast<int>(kChunkClusters);
constexpr int kBlocksPerProcessor = 2;
constexpr int kRowsAhead = 2;  // that a thread has on the way at once; more would not fit its registers

struct UpdateLaunch {
  AttentionJob job;
  int64_t chunks;
  int parts;  // blocks of threads that share out the chunks of a head
  bool aligned;
};

// Rows of K of a chunk that a list names, one in `step` / kDirectionRows, where they lie.
template <class T>
struct ChunkRows {
  using Element = T;
  const T* rows;
  int64_t stride;
  const int32_t* list;
  int step, size;
  bool aligned;
  template <int kEach>
  __device__ __forceinline__ void load(T (&x)[kEach][kChunkRow], const int (&index)[kEach], int at) const {
    const T* row[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) row[i] = rows + list[static_cast<unsigned>(index[i] * step) / kDirectionRows] * stride;
    copy_chunks(x, row, at, size, aligned);
  }
};

struct ClusterMoments {
  float spread, norm;  // mean |x - mean|^2, mean |x|^2
};

// By one warp: the mean of the rows of a cluster, and the moments of their lengths.
template <class T>
__device__ __forceinline__ ClusterMoments mean_of_cluster(const T* rows, int64_t stride, const int32_t* members,
                                                          int64_t size, float* mean) {
  constexpr float kShare = 1.0f / static_cast<float>(kMembers);
  float spread = 0.0f, norm = 0.0f;
  for (int64_t x = threadIdx.x % kWarp; x < size; x += kWarp) {
    float v[kMembers], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMembers; ++i) v[i] = to_float(rows[members[i] * stride + x]);
#pragma unroll
    for (int i = 0; i < kMembers; ++i) sum += v[i];
    const float middle = sum * kShare;
    mean[x] = middle;
#pragma unroll
    for (int i = 0; i < kMembers; ++i) spread += (v[i] - middle) * (v[i] - middle), norm += v[i] * v[i];
  }
  return {warp_sum(spread) * kShare, warp_sum(norm) * kShare};
}

// Of a chunk: calls visit(parts of to, parts of from, floats of a cluster) for each kind of what is kept.
template <class Visit>
__device__ __forceinline__ void each_kind(const HeadSummary& to, const HeadSummary& from, int64_t head_size,
                                          int64_t v_head_size, const Visit& visit) {
  visit(to.mean_key, from.mean_key, head_size);
  visit(to.mean_value, from.mean_value, v_head_size);
  visit(to.keys, from.keys, int64_t{1});
  visit(to.key_spread, from.key_spread, int64_t{1});
  visit(to.value_spread, from.value_spread, int64_t{1});
  visit(to.value_norm, from.value_norm, int64_t{1});
  visit(to.members, from.members, kClusterKeys);
}

template <class T>
__global__ void __launch_bounds__(kUpdateThreads, kBlocksPerProcessor)
    update_kernel(const __grid_constant__ UpdateLaunch update) {
  __shared__ uint32_t found[kUpdateWarps * 2], warp_counts[kUpdateWarps];
  const AttentionJob& job = update.job;
  const QuantumAttentionParams& p = job.params;
  const QuantumAttentionTensors& t = job.tensors;
  const int64_t head = blockIdx.x / update.parts, b = head / p.kv_heads;
  const int64_t len = min(max(t.nonpad_kv_seqlen[b], int64_t{0}), job.total_len);
  const int64_t first_float = head * update.chunks * summary_row(p.head_size, p.v_head_size);
  const HeadSummary to(t.present_key_summary + first_float, update.chunks, p.head_size, p.v_head_size);
  const HeadSummary from(const_cast<float*>(t.key_summary) + first_float, update.chunks, p.head_size, p.v_head_size);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, size = static_cast<int>(p.head_size);
  const int width = node_width(p.head_size);
  float* const directions = dynamic_shared<float>();
  uint32_t* const histogram = reinterpret_cast<uint32_t*>(directions + kUpdateWarps * kArrayRowsOfWarp * width);
  int32_t* const list = reinterpret_cast<int32_t*>(histogram + kUpdateWarps * kDigits);
  int32_t* const side = list + kKeys;
  uint32_t* const key = reinterpret_cast<uint32_t*>(side + kKeys);
  for (int64_t c = blockIdx.x % update.parts; c < update.chunks; c += update.parts) {
    const int64_t end = kSinkKeys + (c + 1) * kChunkKeys, first = c * kClusters;
    const bool full = end <= len;
    if (full && (end > len - p.q_len || from.keys[first] != static_cast<float>(kMembers))) {
      const T* const keys = row_of<T>(t.k, b, head % p.kv_heads, end - kKeys);
      const T* const values = row_of<T>(t.v, b, head % p.kv_heads, end - kKeys);
      __syncthreads();  // the chunk before is done with the list
      for (int i = thread; i < kKeys; i += kUpdateThreads) list[i] = i;
      divide_list<kRowsAhead>({directions, histogram, list, side, key, found, warp_counts}, kKeys, kMembers, size, width,
                              [&](const int32_t* some, int step) {
                                return ChunkRows<T>{keys, t.k.row_stride, some, step, size, update.aligned};
                              });
      for (int i = thread; i < kKeys; i += kUpdateThreads) to.members[first * kMembers + i] = static_cast<float>(list[i]);
      for (int i = warp; i < kClusters; i += kUpdateWarps) {
        const int64_t own = first + i;
        const int32_t* const members = list + i * kMembers;
        const ClusterMoments k =
            mean_of_cluster(keys, t.k.row_stride, members, p.head_size, to.mean_key + own * p.head_size);
        const ClusterMoments v =
            mean_of_cluster(values, t.v.row_stride, members, p.v_head_size, to.mean_value + own * p.v_head_size);
        if (thread % kWarp > 0) continue;
        to.keys[own] = static_cast<float>(kMembers);
        to.key_spread[own] = k.spread, to.value_spread[own] = v.spread, to.value_norm[own] = v.norm;
      }
      continue;
    }
    if (to.keys != from.keys) {
      each_kind(to, from, p.head_size, p.v_head_size, [&](float* into, const float* of, int64_t floats) {
        for (int64_t i = thread; i < kClusters * floats; i += kUpdateThreads) {
          into[first * floats + i] = of[first * floats + i];
        }
      });
      __syncthreads();  // what the mark below is written over
    }
    // The cache may have been cut back.
    if (!full && thread == 0) to.keys[first] = 0.0f;
  }
}

}  // namespace

void update_summary(Status& status, const AttentionJob& job, void* stream) {
  const QuantumAttentionParams& p = job.params;
  const int64_t chunks = summary_chunks(job.total_len), heads = p.batch * p.kv_heads;
  if (chunks * heads == 0) return;
  if (std::max(p.head_size, p.v_head_size) > kMostSummarySize) {
    const int64_t floats = heads * chunks * summary_row(p.head_size, p.v_head_size);
    return fill_zero(status, job.tensors.present_key_summary, static_cast<size_t>(floats) * sizeof(float), stream);
  }
  const Device device = current_device(status);
  const int64_t fill = ceil_div<int64_t>(kBlocksPerProcessor * device.multiprocessors, heads);
  UpdateLaunch update{job, chunks, static_cast<int>(std::min(chunks, fill)), false};
  const size_t shared = sizeof(float) * (kUpdateWarps * (kArrayRowsOfWarp * node_width(p.head_size) + kDigits) + 3 * kKeys);
  visit_type(p.type, [&](auto element) {
    update.aligned = starts_on_16_bytes(job.tensors.k, sizeof(element));
    launch(status, update_kernel<decltype(element)>, dim3(static_cast<unsigned>(heads * update.parts)), dim3(kUpdateThreads),
           shared, stream, update);
  });
}

}  // namespace cuda
}  // namespace qexport
