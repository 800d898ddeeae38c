// The values in clusters, for `hybrid` with control variate: what a key that is not read is worth (docs/math.md, "hybrid").
#include "balanced_tree.cuh"
#include "rows.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kCentreWarps = 8;  // of a block, a cluster each

BalancedTree value_tree(const AttentionJob& job) { return {true, false, kValueCluster, job.total_len}; }

// centre = the mean of the values of a cluster, and norm[j] = |v_j - centre| of each. A norm is finite: one that runs out of
// float32, or is no number, is as large as can be.
template <class T>
__global__ void value_centres_kernel(const AttentionJob job, const int32_t* order, float* centre, float* norm) {
  const QuantumAttentionParams& p = job.params;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t clusters = value_clusters(job), c = static_cast<int64_t>(blockIdx.x) * kCentreWarps + warp;
  const int64_t heads = p.batch * p.kv_heads;
  if (c >= heads * clusters) return;
  const int64_t head = c / clusters;
  const JoinedRows<T> values = joined_rows<T>(job, true, head / p.kv_heads, head % p.kv_heads);
  const int32_t* members = order + c * kValueCluster;
  const int32_t own = lane < kValueCluster ? members[lane] : -1;
  const int count = __popc(__ballot_sync(kFullWarp, own >= 0));  // those without a key are the last ones
  float* mean = centre + c * p.v_head_size;
  float square[kValueCluster];
  for (int i = 0; i < kValueCluster; ++i) square[i] = 0.0f;
  for (int32_t x = lane; x < p.v_head_size; x += kWarp) {
    float v[kValueCluster], sum = 0.0f;
    for (int i = 0; i < kValueCluster; ++i) v[i] = i < count ? to_float(values.row(members[i])[x]) : 0.0f;
    for (int i = 0; i < kValueCluster; ++i) sum += v[i];
    const float middle = sum / static_cast<float>(count > 0 ? count : 1);
    mean[x] = middle;
    for (int i = 0; i < kValueCluster; ++i) square[i] += (v[i] - middle) * (v[i] - middle);
  }
  constexpr float kLargest = 3.402823466e+38f;
  for (int i = 0; i < kValueCluster; ++i) {
    const float length = sqrtf(warp_sum(square[i]));
    if (lane == i && i < count) norm[head * norm_pitch(job) + own] = length < kLargest ? length : kLargest;
  }
}

template <class T>
void centre_values(Status& status, const AttentionJob& job, const ValueClusters& clusters, void* stream) {
  const int64_t count = job.params.batch * job.params.kv_heads * value_clusters(job);
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(count, kCentreWarps)));
  launch(status, value_centres_kernel<T>, grid, dim3(kCentreWarps * kWarp), 0, stream, job, clusters.order, clusters.centre,
         clusters.norm);
}

}  // namespace

size_t value_tree_scratch_bytes(const AttentionJob& job) { return balanced_tree_scratch_bytes(job, value_tree(job)); }

void cluster_values(Status& status, const AttentionJob& job, const ValueClusters& clusters, void* stream) {
  balanced_tree(status, job, value_tree(job), clusters.order, clusters.count, clusters.tree, stream);
  visit_type(job.params.type, [&](auto element) { centre_values<decltype(element)>(status, job, clusters, stream); });
}

}  // namespace cuda
}  // namespace qexport
