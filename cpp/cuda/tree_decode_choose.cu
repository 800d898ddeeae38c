// The weight of every cluster for every row, and the clusters that a row reads.
#include "mma.cuh"
#include "node_direction.cuh"
#include "tree_decode.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kScoreThreads = 256, kScoreEach = 2;  // clusters that a thread has a share of
constexpr int kScoredTogether = kScoreThreads / kRowThreads * kScoreEach;
constexpr int kChooseThreads = 512;

// weight = log2(e) softcap(q . mean_key) of all clusters of a head, which all of its rows are multiplied with.
template <class T>
__global__ void __launch_bounds__(kScoreThreads)
    score_clusters_kernel(const __grid_constant__ DecodeLaunch decode, int runs) {
  constexpr int kRows = static_cast<int>(kMostDecodeRows);
  const AttentionJob& job = decode.job;
  const QuantumAttentionParams& p = job.params;
  const int64_t head = blockIdx.x / runs, clusters = decode.clusters(), first_row = head * job.group * p.q_len;
  const int size = static_cast<int>(p.head_size), width = node_width(size), rows = static_cast<int>(job.group * p.q_len);
  const int thread = static_cast<int>(threadIdx.x);
  float* const queries = dynamic_shared<float>();  // (rows, width)
  for (int i = thread; i < rows * width; i += kScoreThreads) {
    const int64_t row = first_row + i / width, place = row / p.q_len;
    const int x = i % width;
    const T* const q = row_of<T>(job.tensors.q, place / p.q_heads, place % p.q_heads, row % p.q_len);
    queries[i] = x < size ? to_float(q[x]) * p.scale : 0.0f;
  }
  __syncthreads();
  const float* const keys = decode.head_summary(head).mean_key;
  const int64_t first = int64_t{blockIdx.x} % runs * kScoredTogether + thread / kRowThreads;
  const float* mean[kScoreEach];
#pragma unroll
  for (int i = 0; i < kScoreEach; ++i) {
    mean[i] = keys + min(first + i * (kScoreThreads / kRowThreads), clusters - 1) * size;
  }
  float score[kRows][kScoreEach] = {};
  for (int at = first_chunk(); at < width; at += kPass) {
    __align__(16) float k[kScoreEach][kChunkRow], q[kChunkRow];
    copy_chunks(k, mean, at, size, decode.keys_wide);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) continue;
      copy_whole_chunk(q, queries + r * width + at);
#pragma unroll
      for (int e = 0; e < kChunkRow; ++e) {
#pragma unroll
        for (int i = 0; i < kScoreEach; ++i) score[r][i] = fmaf(q[e], k[i][e], score[r][i]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) continue;
    sum_over_row(score[r]);
#pragma unroll
    for (int i = 0; i < kScoreEach; ++i) {
      const int64_t c = first + i * (kScoreThreads / kRowThreads);
      if (first_chunk() == 0 && c < clusters) {
        decode.weight[(first_row + r) * clusters + c] = decode_score(score[r][i], p.softcap);
      }
    }
  }
}

// The chunks that all rows of a kv head see all keys of and that are summarised.
__device__ ReadPlan usable_chunks(const DecodeLaunch& decode, int64_t place, int32_t* parts) {
  const QuantumAttentionParams& p = decode.job.params;
  int64_t lo = 0, hi = decode.job.total_len;  // keys that all rows see
  for (int64_t query = 0; query < p.q_len; ++query) {
    const KeyRange range = key_range(decode.job, place / p.q_heads, query);
    lo = max(lo, range.lo), hi = min(hi, range.hi);
  }
  const float* const keys = decode.head_summary(decode.head_of(place)).keys;
  const int32_t first = static_cast<int32_t>(ceil_div(max(lo - kSinkKeys, int64_t{0}), kChunkKeys));
  int32_t end = static_cast<int32_t>(min(decode.chunks, summary_chunks(hi)));
  for (int32_t c = first + static_cast<int32_t>(threadIdx.x); c < end; c += kChooseThreads) {
    if (keys[c * kChunkClusters] != static_cast<float>(kClusterKeys)) end = c;
  }
  return {first, max(first, -block_max(-end, parts)), 0};
}

// Clusters that a head reads at first.
__device__ int first_budget(const DecodeLaunch& decode, int64_t q_head, int clusters) {
  int budget = static_cast<int>(min(ceil_div(int64_t{decode.samples.of(q_head)}, kClusterKeys), int64_t{clusters}));
  // Few beside those that are drawn to tell the error, to begin with or to be left, save nothing.
  if (decode.job.params.error_tolerance > 0.0f) budget = max(budget, kResidualClusters);
  return budget + kResidualClusters >= clusters ? clusters : budget;
}

// Whether the heads of a kv head try to keep the tolerance with fewer keys than all.
__device__ bool tries(const DecodeLaunch& decode, int64_t place, int clusters, int64_t* parts) {
  const QuantumAttentionParams& p = decode.job.params;
  const int64_t group = decode.job.group, first = place % p.q_heads / group * group;
  int64_t longest = 0;
  for (int64_t b = threadIdx.x; b < p.batch; b += kChooseThreads) {
    longest = max(longest, decode.job.tensors.nonpad_kv_seqlen[b]);
  }
  longest = min(block_max(longest, parts), decode.job.total_len);
  int most = 0;
  for (int64_t h = first; h < first + group; ++h) most = max(most, first_budget(decode, h, clusters));
  return longest >= decode.least_keys && kMostTried * int64_t{most} <= clusters;
}

// weight += the spread of the keys, and gain, from second moments: the mean of exp(q . k) over a cluster is taken for
// exp(q . mean_key + |q|^2 key_spread / 2 head_size), as if its keys lay around their mean alike in all directions.
template <class T>
__device__ void weigh_clusters(const DecodeLaunch& decode, int64_t row, const ReadPlan& plan, float* parts) {
  const QuantumAttentionParams& p = decode.job.params;
  const int64_t place = row / p.q_len, first = plan.first_cluster();
  const T* const q = row_of<T>(decode.job.tensors.q, place / p.q_heads, place % p.q_heads, row % p.q_len);
  const HeadSummary summary = decode.head_summary(decode.head_of(place));
  float square = 0.0f;
  for (int64_t x = threadIdx.x; x < p.head_size; x += kChooseThreads) {
    const float scaled = to_float(q[x]) * p.scale;
    square += scaled * scaled;
  }
  square = block_sum(square, parts) / static_cast<float>(p.head_size);
  float* const weight = decode.weight + row * decode.clusters() + first;
  uint32_t* const key = decode.gain_key + row * decode.clusters() + first;
  float most = -kInf;
  for (int c = static_cast<int>(threadIdx.x); c < plan.clusters(); c += kChooseThreads) {
    weight[c] += summary.key_spread[first + c] * (0.5f * kLog2E * square);
    most = fmaxf(most, weight[c]);
  }
  most = block_max(most, parts);
  for (int c = static_cast<int>(threadIdx.x); c < plan.clusters(); c += kChooseThreads) {
    const float w = fast_exp2(weight[c] - most);
    // exp(spread) - 1, with a limit that keeps it within float32
    const float spread = expm1f(fminf(summary.key_spread[first + c] * square, 20.0f));
    key[c] = gain_key(w * w * (summary.value_spread[first + c] + summary.value_norm[first + c] * spread));
  }
}

// One row per block of threads: the clusters of the largest gain (ties: the first), in order.
template <class T>
__global__ void __launch_bounds__(kChooseThreads) choose_clusters_kernel(const __grid_constant__ DecodeLaunch decode) {
  __shared__ PartitionShared shared;
  __shared__ int64_t parts[kWarp];
  const QuantumAttentionParams& p = decode.job.params;
  const int64_t row = blockIdx.x, place = row / p.q_len;
  const int thread = static_cast<int>(threadIdx.x);
  if (decode.attempt > 0 && decode.settled(place)) return;
  ReadPlan plan = usable_chunks(decode, place, reinterpret_cast<int32_t*>(parts));
  const int clusters = plan.clusters();
  if (p.error_tolerance > 0.0f && decode.attempt == 0) {
    const bool open = tries(decode, place, clusters, parts);
    if (thread == 0 && row % p.q_len == 0) decode.reads_all(place) = !open, decode.done[place] = 0;
    if (!open) return;
  }
  if (decode.attempt == 0) weigh_clusters<T>(decode, row, plan, reinterpret_cast<float*>(parts));
  const int budget = first_budget(decode, place % p.q_heads, clusters);
  plan.chosen = static_cast<int32_t>(min(int64_t{budget} << decode.attempt, int64_t{clusters}));
  if (thread == 0) decode.plan[row] = plan;
  float* const weight = decode.weight + row * decode.clusters() + plan.first_cluster();
  const uint32_t* const key = decode.gain_key + row * decode.clusters() + plan.first_cluster();
  int32_t* const chosen = decode.chosen + row * decode.most_chosen;
  take_smallest(key, clusters, plan.chosen, shared, [&](int at, int c) {
    chosen[at] = plan.first_cluster() + c;
    weight[c] = -kInf;
  });
}

template <class T>
void choose(Status& status, const DecodeLaunch& decode, void* stream) {
  const QuantumAttentionParams& p = decode.job.params;
  const int64_t heads = p.batch * p.kv_heads, rows = decode.job.group * p.q_len;
  const int runs = static_cast<int>(ceil_div<int64_t>(decode.clusters(), kScoredTogether));
  if (decode.attempt == 0) {
    launch(status, score_clusters_kernel<T>, dim3(static_cast<unsigned>(heads * runs)), dim3(kScoreThreads),
           sizeof(float) * static_cast<size_t>(rows * node_width(p.head_size)), stream, decode, runs);
  }
  launch(status, choose_clusters_kernel<T>, dim3(static_cast<unsigned>(decode.rows())), dim3(kChooseThreads), 0, stream,
         decode);
}

}  // namespace

void choose_clusters(Status& status, const DecodeLaunch& decode, void* stream) {
  visit_type(decode.job.params.type, [&](auto element) { choose<decltype(element)>(status, decode, stream); });
}

}  // namespace cuda
}  // namespace qexport
