// The samples of every row of `adaptive`: S_r = min(n_r, max(1, c g_r)), g_r = S_h sqrt(exp H_r), with c such that
// sum S_r = sum min(S_h, n_r) over the rows of a batch item.
#include "rows.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kBudgetThreads = 1024;

// One block per batch item. The sum is piecewise linear in c and grows with it: Newton's method meets the piece that holds
// the solution after a few steps; what leaves the bracket is bisected.
__global__ void __launch_bounds__(kBudgetThreads) share_budget_kernel(const RowWork work, double* budget) {
  const QuantumAttentionParams& p = work.job.params;
  const int64_t rows = p.q_heads * p.q_len, offset = blockIdx.x * rows;
  double* parts = dynamic_shared<double>();
  double* g = budget + offset;
  const int32_t* allowed = work.allowed + offset;
  double target = 0.0, high = 0.0;
  for (int64_t r = threadIdx.x; r < rows; r += kBudgetThreads) {
    const int32_t samples = work.samples.of(r / p.q_len);
    const double own = static_cast<double>(samples) * exp(0.5 * static_cast<double>(work.entropy[offset + r]));
    g[r] = own;  // read again by this thread alone
    if (allowed[r] == 0) continue;
    target += min(samples, allowed[r]);
    const double full = allowed[r] / own;
    high = full > high ? full : high;
  }
  target = block_sum(target, parts);
  high = block_max(high, parts);
  double low = 0.0, c = high;
  for (int step = 0; step < 64 && low < high; ++step) {
    double sum = 0.0, slope = 0.0;
    for (int64_t r = threadIdx.x; r < rows; r += kBudgetThreads) {
      const double want = c * g[r], most = allowed[r];
      sum += min(most, max(1.0, want));
      slope += want > 1.0 && want < most ? g[r] : 0.0;
    }
    sum = block_sum(sum, parts);
    slope = block_sum(slope, parts);
    (sum < target ? low : high) = c;
    const double next = c + (target - sum) / slope;
    if (sum == target || next == c) break;
    c = next > low && next < high ? next : low + (high - low) / 2;
  }
  for (int64_t r = threadIdx.x; r < rows; r += kBudgetThreads) {
    g[r] = min(static_cast<double>(allowed[r]), max(1.0, c * g[r]));
  }
}

}  // namespace

void share_budget(Status& status, const RowWork& work, double* budget, void* stream) {
  launch(status, share_budget_kernel, dim3(static_cast<unsigned>(work.job.params.batch)), dim3(kBudgetThreads),
         kWarp * sizeof(double), stream, work, budget);
}

}  // namespace cuda
}  // namespace qexport
