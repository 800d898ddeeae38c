// The mean value of the valid keys, and how far every value lies from it: the control variate of the strategies that sample.
#include "rows.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kStatsKeys = 128;  // of a block
constexpr int kStatsThreads = 256, kStatsWarps = kStatsThreads / kWarp;
constexpr int kStatsColumns = 4 * kWarp;  // that are summed at a time

int64_t stats_parts(const AttentionJob& job) { return ceil_div<int64_t>(job.total_len, kStatsKeys); }

// sums[x] = sum of row(j)[x] over the rows [first, end), x < size, by all threads of a block; behind it they see it.
// `parts`: kStatsWarps * kStatsColumns floats of shared memory.
template <class T>
__device__ __forceinline__ void sum_rows(const JoinedRows<T>& rows, int32_t first, int32_t end, int size, float* parts,
                                         float* sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int x = 0; x < size; x += kStatsColumns) {
    float sum[4] = {};
    for (int32_t j = first + warp; j < end; j += kStatsWarps) {
      const T* row = rows.row(j);
      for (int u = 0; u < 4; ++u) {
        const int own = x + u * kWarp + lane;
        if (own < size) sum[u] += to_float(row[own]);
      }
    }
    for (int u = 0; u < 4; ++u) parts[warp * kStatsColumns + u * kWarp + lane] = sum[u];
    __syncthreads();
    const int column = static_cast<int>(threadIdx.x);
    if (column < kStatsColumns && x + column < size) {
      float total = 0.0f;
      for (int i = 0; i < kStatsWarps; ++i) total += parts[i * kStatsColumns + column];
      sums[x + column] = total;
    }
    __syncthreads();
  }
}

// partial[head][part] = sums of the values of the valid keys of a part. Blocks: (batch, kv head, part), part fastest.
template <class T>
__global__ void __launch_bounds__(kStatsThreads) value_sums_kernel(const AttentionJob job, float* partial) {
  const QuantumAttentionParams& p = job.params;
  const int64_t parts = ceil_div<int64_t>(job.total_len, kStatsKeys), head = blockIdx.x / parts, b = head / p.kv_heads;
  const int32_t first = static_cast<int32_t>(blockIdx.x % parts * kStatsKeys);
  const int32_t end = static_cast<int32_t>(min(int64_t{first} + kStatsKeys, valid_keys(job, b)));
  const JoinedRows<T> values = joined_rows<T>(job, true, b, head % p.kv_heads);
  sum_rows(values, first, end, static_cast<int>(p.v_head_size), dynamic_shared<float>(),
           partial + blockIdx.x * p.v_head_size);
}

// Every block adds the parts up for itself; the first of a head writes the mean. A warp takes the norm of one key at a time.
template <class T>
__global__ void __launch_bounds__(kStatsThreads)
    value_norms_kernel(const AttentionJob job, const float* partial, float* mean, float* norm) {
  const QuantumAttentionParams& p = job.params;
  const int64_t parts = ceil_div<int64_t>(job.total_len, kStatsKeys), head = blockIdx.x / parts, b = head / p.kv_heads;
  const int32_t first = static_cast<int32_t>(blockIdx.x % parts * kStatsKeys);
  const int32_t end = static_cast<int32_t>(min(int64_t{first} + kStatsKeys, job.total_len));
  const int size = static_cast<int>(p.v_head_size), lane = static_cast<int>(threadIdx.x) % kWarp;
  float* shared = dynamic_shared<float>();
  float* own = shared + kStatsWarps * kStatsColumns;
  sum_rows(JoinedRows<float>{nullptr, partial + head * parts * size, 0, size, 0}, 0, static_cast<int32_t>(parts), size,
           shared, own);
  const int64_t valid = valid_keys(job, b);
  for (int x = static_cast<int>(threadIdx.x); x < size; x += kStatsThreads) {
    own[x] = valid > 0 ? own[x] / static_cast<float>(valid) : 0.0f;
    if (first == 0) mean[head * size + x] = own[x];
  }
  __syncthreads();
  const JoinedRows<T> values = joined_rows<T>(job, true, b, head % p.kv_heads);
#pragma unroll 4
  for (int32_t j = first + static_cast<int32_t>(threadIdx.x) / kWarp; j < end; j += kStatsWarps) {
    const T* row = values.row(j);
    float square = 0.0f;
    for (int x = lane; x < size; x += kWarp) {
      const float d = to_float(row[x]) - own[x];
      square += d * d;
    }
    square = warp_sum(square);
    if (lane == 0) norm[head * norm_pitch(job) + j] = sqrtf(square);
  }
}

template <class T>
void run_stats(Status& status, const AttentionJob& job, float* partial, float* mean, float* norm, void* stream) {
  const QuantumAttentionParams& p = job.params;
  const dim3 grid(static_cast<unsigned>(p.batch * p.kv_heads * stats_parts(job)));
  const size_t parts = kStatsWarps * kStatsColumns * sizeof(float),
               mean_bytes = static_cast<size_t>(p.v_head_size) * sizeof(float);
  launch(status, value_sums_kernel<T>, grid, dim3(kStatsThreads), parts, stream, job, partial);
  launch(status, value_norms_kernel<T>, grid, dim3(kStatsThreads), parts + mean_bytes, stream, job, partial, mean, norm);
}

}  // namespace

int64_t value_partial_floats(const AttentionJob& job) {
  return job.params.batch * job.params.kv_heads * stats_parts(job) * job.params.v_head_size;
}

void value_stats(Status& status, const AttentionJob& job, float* partial, float* mean, float* norm, void* stream) {
  visit_type(job.params.type, [&](auto element) { run_stats<decltype(element)>(status, job, partial, mean, norm, stream); });
}

}  // namespace cuda
}  // namespace qexport
