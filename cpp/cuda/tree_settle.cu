// What is settled between two starts of the kernels of tiles (docs/math.md, "tree": "Budget", "error_tolerance",
// "error_estimate").
#include "tree.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kShareThreads = 1024, kSettleThreads = 256;

// The thresholds of a batch item: a cluster is read where its score, relative to the norm of its head, reaches tau, with tau
// such that the probed tiles read the budget on average.
__global__ void __launch_bounds__(kShareThreads) thresholds_kernel(const __grid_constant__ TreeLaunch tree) {
  __shared__ int parts[kWarp];
  const QuantumAttentionParams& p = tree.job.params;
  const int64_t first = blockIdx.x * p.q_heads;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int budget = tree.bought(first), candidates = ceil_div(tree.count[blockIdx.x * p.kv_heads], kCluster);
  const auto norm = [&](int64_t place) {
    float sum = 0.0f;
    for (int i = 0; i < kProbes; ++i) sum += tree.probe_norm[place * kProbes + i];
    return sum / kProbes;
  };
  float low = -60.0f, high = 0.0f;  // of the exponent of tau
  for (int step = 0; step < 16; ++step) {
    const float middle = 0.5f * (low + high), tau = exp2f(middle);
    int read = 0;
    for (int64_t i = warp; i < p.q_heads * kProbes; i += kShareThreads / kWarp) {
      const int64_t probe = first * kProbes + i;
      const float least = tau * norm(probe / kProbes);
      int reached = 0;
      for (int c = lane; c < candidates; c += kWarp) reached += tree.score[probe * tree.clusters + c] >= least;
      reached = warp_sum(reached);
      if (lane == 0) read += max(least_shared(budget), min(reached, most_shared(budget)));
    }
    read = block_sum(read, parts);
    (read > p.q_heads * kProbes * budget ? low : high) = middle;
  }
  for (int64_t h = threadIdx.x; h < p.q_heads; h += kShareThreads) tree.threshold[first + h] = exp2f(high) * norm(first + h);
}

// sums[0 .. 2] = |a - b|^2 and |b|^2 over n elements, on every thread.
__device__ void squared_distance(const float* a, const float* b, int64_t n, double* sums, double* parts) {
  double difference = 0.0, norm = 0.0;
  for (int64_t i = threadIdx.x; i < n; i += kSettleThreads) {
    const double x = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    difference += x * x, norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  sums[0] = block_sum(difference, parts), sums[1] = block_sum(norm, parts);
}

// The least budget at which the trial tiles of a place keep the tolerance, with a margin for the others; all clusters where
// there is none.
__global__ void __launch_bounds__(kSettleThreads) budgets_kernel(const __grid_constant__ TreeLaunch tree) {
  __shared__ double parts[kWarp];
  const QuantumAttentionParams& p = tree.job.params;
  const int64_t place = blockIdx.x, bought = tree.bought(place);
  const double limit = static_cast<double>(kToleranceMargin * p.error_tolerance), square = limit * limit;
  int doublings = 0;
  while (doublings + 1 < tree.trials && 2 * (bought << doublings) <= tree.clusters) ++doublings;
  bool kept = doublings > 0;
  int64_t budget = tree.clusters;
  for (int i = doublings - 1; i >= 0 && kept; --i) {  // the most first: where it fails, all do
    double error = 0.0, norm = 0.0;
    for (int t = 0; t < kTrials && kept; ++t) {
      const int64_t tile = tree.probe_tile(kProbes - 1 - t), rows = min(p.q_len - tile * kTreeRows, int64_t{kTreeRows});
      const float* const outputs = tree.trial_output + (place * kTrials + t) * tree.trials * kTreeRows * p.v_head_size;
      const auto output = [&](int k) { return outputs + int64_t{k} * kTreeRows * p.v_head_size; };
      double sums[2];
      squared_distance(output(i), output(tree.trials - 1), rows * p.v_head_size, sums, parts);
      error += sums[0], norm += sums[1];
      if (i == doublings - 1) kept = error <= square * norm;
    }
    if (kept && error <= square * norm) budget = bought << i;
  }
  if (threadIdx.x == 0) tree.budget[place] = static_cast<int32_t>(kept ? budget : tree.clusters);
}

// error_estimate of a place, from the parts of its exact rows; with a tolerance also whether it is to be computed again.
template <class T>
__global__ void __launch_bounds__(kSettleThreads) errors_kernel(const __grid_constant__ TreeLaunch tree) {
  __shared__ double parts[kWarp];
  const QuantumAttentionParams& p = tree.job.params;
  const int64_t place = blockIdx.x, rows = min(p.q_len, int64_t{kAuditRows});
  const bool exact = (tree.budget ? tree.budget[place] : tree.bought(place)) >= tree.clusters;
  double difference = 0.0, norm = 0.0;
  for (int64_t i = threadIdx.x; i < rows * p.v_head_size && !exact; i += kSettleThreads) {
    const int64_t row = i / p.v_head_size, x = i % p.v_head_size;
    const auto at = [&](int part) { return (place * tree.audit_parts + part) * kTreeRows + row; };
    float most = -kInf, sum = 0.0f, o = 0.0f;
    for (int part = 0; part < tree.audit_parts; ++part) most = fmaxf(most, tree.stats[2 * at(part)]);
    for (int part = 0; part < tree.audit_parts; ++part) {
      const float* const stats = tree.stats + 2 * at(part);
      if (!(stats[1] > 0.0f)) continue;
      const float fade = exp2f(stats[0] - most);
      sum += fade * stats[1], o += fade * tree.audit_output[at(part) * p.v_head_size + x];
    }
    const double right = sum > 0.0f ? static_cast<double>(o / sum) : 0.0;
    const int64_t query = tree.audit_row(place, static_cast<int>(row));
    const T* const y = output_row<T>(tree.job, place / p.q_heads, place % p.q_heads, query);
    const double off = static_cast<double>(to_float(y[x])) - right;
    difference += off * off, norm += right * right;
  }
  difference = block_sum(difference, parts), norm = block_sum(norm, parts);
  if (threadIdx.x != 0) return;
  float error = norm > 0.0 ? static_cast<float>(sqrt(difference / norm)) : 0.0f;
  if (p.error_tolerance > 0.0f) {
    const bool missed = !(error <= kToleranceMargin * p.error_tolerance);
    tree.again[place] = missed;
    if (missed) error = 0.0f;
  }
  if (tree.job.tensors.error_estimate) tree.job.tensors.error_estimate[place] = error;
}

}  // namespace

void settle_thresholds(Status& status, const TreeLaunch& tree, void* stream) {
  launch(status, thresholds_kernel, dim3(static_cast<unsigned>(tree.job.params.batch)), kShareThreads, 0, stream, tree);
}

void settle_budgets(Status& status, const TreeLaunch& tree, void* stream) {
  launch(status, budgets_kernel, dim3(static_cast<unsigned>(tree.places())), kSettleThreads, 0, stream, tree);
}

void settle_errors(Status& status, const TreeLaunch& tree, void* stream) {
  visit_type(tree.job.params.type, [&](auto element) {
    launch(status, errors_kernel<decltype(element)>, dim3(static_cast<unsigned>(tree.places())), kSettleThreads, 0, stream,
           tree);
  });
}

}  // namespace cuda
}  // namespace qexport
