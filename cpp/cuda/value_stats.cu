// The mean value of the valid keys, and how far every value lies from it: the control variate of the strategies that sample.
#include "rows.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kStatsKeys = 128;  // of a block
constexpr int kStatsThreads = 256;

int64_t stats_parts(const AttentionJob& job) { return ceil_div<int64_t>(job.total_len, kStatsKeys); }

// partial[head][part][x] = sum of v_j[x] over the valid keys of a part. Blocks: (batch, kv head, part), part fastest.
template <class T>
__global__ void value_sums_kernel(const AttentionJob job, float* partial) {
  const QuantumAttentionParams& p = job.params;
  const int64_t parts = ceil_div<int64_t>(job.total_len, kStatsKeys), head = blockIdx.x / parts;
  const int64_t b = head / p.kv_heads, kv_head = head % p.kv_heads, first = blockIdx.x % parts * kStatsKeys;
  const int64_t end = min(first + kStatsKeys, valid_keys(job, b));
  for (int64_t x = threadIdx.x; x < p.v_head_size; x += kStatsThreads) {
    float sum = 0.0f;
    for (int64_t j = first; j < end; ++j) sum += to_float(key_row<T>(job, true, b, kv_head, j)[x]);
    partial[blockIdx.x * p.v_head_size + x] = sum;
  }
}

// Every block adds the parts up for itself; the first of a head writes the mean. A warp takes the norm of one key at a time.
template <class T>
__global__ void value_norms_kernel(const AttentionJob job, const float* partial, float* mean, float* norm) {
  const QuantumAttentionParams& p = job.params;
  const int64_t parts = ceil_div<int64_t>(job.total_len, kStatsKeys), head = blockIdx.x / parts;
  const int64_t b = head / p.kv_heads, kv_head = head % p.kv_heads, first = blockIdx.x % parts * kStatsKeys;
  const int64_t size = p.v_head_size, valid = valid_keys(job, b), end = min(first + kStatsKeys, job.total_len);
  float* own = dynamic_shared<float>();
  for (int64_t x = threadIdx.x; x < size; x += kStatsThreads) {
    float sum = 0.0f;
    for (int64_t part = 0; part < parts; ++part) sum += partial[(head * parts + part) * size + x];
    own[x] = valid > 0 ? sum / static_cast<float>(valid) : 0.0f;
    if (first == 0) mean[head * size + x] = own[x];
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t j = first + threadIdx.x / kWarp; j < end; j += kStatsThreads / kWarp) {
    const T* row = key_row<T>(job, true, b, kv_head, j);
    float square = 0.0f;
    for (int64_t x = lane; x < size; x += kWarp) {
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
  launch(status, value_sums_kernel<T>, grid, dim3(kStatsThreads), 0, stream, job, partial);
  launch(status, value_norms_kernel<T>, grid, dim3(kStatsThreads), static_cast<size_t>(p.v_head_size) * sizeof(float),
         stream, job, partial, mean, norm);
}

}  // namespace

int64_t value_partial_floats(const AttentionJob& job) {
  return job.params.batch * job.params.kv_heads * stats_parts(job) * job.params.v_head_size;
}

void value_stats(Status& status, const AttentionJob& job, float* partial, float* mean, float* norm, void* stream) {
  switch (job.params.type) {
    case DType::f16:
      return run_stats<__half>(status, job, partial, mean, norm, stream);
    case DType::bf16:
      return run_stats<__nv_bfloat16>(status, job, partial, mean, norm, stream);
    default:
      return run_stats<float>(status, job, partial, mean, norm, stream);
  }
}

}  // namespace cuda
}  // namespace qexport
