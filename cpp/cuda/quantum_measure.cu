// QuantumMeasure on CUDA: a block per row finds its cumulative distribution in fixed point, and a thread per four shots
// searches in it.
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "probability_rows.cuh"
#include "qexport/philox.h"

namespace qexport {
namespace cuda {
namespace {

constexpr int kFewThreads = 128, kManyThreads = 512;
constexpr int64_t kFewNumbers = 1024;  // up to which a row has few threads
constexpr int kPart = 512;             // numbers that are added up one by one between two barriers

struct MeasureJob {
  QuantumMeasureParams params;
  QuantumMeasureTensors tensors;
  const int64_t* seed;
  double tolerance;
  uint32_t* scratch;  // 2 n for each block, where these do not fit shared memory
};

// The sum in the order of j, whose bits every program has. Numbers below one that are multiples of 2^-52 have sums below
// two that are so too, and no order rounds; only where others are among them does one thread add up the row. On every
// thread; NaN where a number is no probability.
template <class T>
__device__ double sum_in_order(const T* p, int64_t n) {
  __shared__ double parts[kWarp], part[kPart], result;
  double sum = 0.0;
  bool rounds = false;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const double x = to_real(p[j]);
    rounds = rounds || (1.0 + x) - 1.0 != x;
    sum += summand(x);
  }
  sum = block_sum(sum, parts);
  if (!__syncthreads_or(rounds)) return sum;
  // A row that is no distribution needs no exact sum, and is NaN if a number is negative.
  if (sum != sum) return sum;
  sum = 0.0;
  for (int64_t begin = 0; begin < n; begin += kPart) {
    const int count = static_cast<int>(min(int64_t{kPart}, n - begin));
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x))
      part[i] = to_real(p[begin + i]);
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll 16
      for (int i = 0; i < count; ++i) sum += part[i];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) result = sum;
  __syncthreads();
  return result;
}

// Replaces numbers by their prefix sums, the last of which comes back on every thread. Threads have adjacent numbers; that
// these are an odd number keeps the threads of a warp in different banks.
template <class Index>
__device__ uint32_t cumulate(uint32_t* numbers, Index n) {
  __shared__ uint32_t warp_sums[kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const Index each = ceil_div(n, static_cast<Index>(blockDim.x)) | 1;
  const Index begin = min(n, static_cast<Index>(threadIdx.x) * each), end = min(n, begin + each);
  uint32_t own = 0;
  for (Index j = begin; j < end; ++j) own += numbers[j];
  uint32_t before = own;
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t lower = __shfl_up_sync(kFullWarp, before, static_cast<unsigned>(step));
    if (lane >= step) before += lower;
  }
  if (lane == kWarp - 1) warp_sums[warp] = before;
  before -= own;
  __syncthreads();
  uint32_t total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    if (w == warp) before += total;
    total += warp_sums[w];
  }
  for (Index j = begin; j < end; ++j) numbers[j] = before += numbers[j];
  __syncthreads();
  return total;
}

// found[i] = the first j with cumulative[j] > target[i]; four at a time, since each step waits for the one before.
template <class Index>
__device__ __forceinline__ void outcomes(const uint32_t* cumulative, Index n, const uint32_t (&target)[4],
                                         Index (&found)[4]) {
  for (Index& place : found) place = 0;
  while (n > 1) {
    const Index half = n / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) found[i] += cumulative[found[i] + half - 1] <= target[i] ? half : 0;
    n -= half;
  }
}

template <class Index>
__device__ void count_shots(const QuantumMeasureParams& p, uint64_t seed, int64_t row, const uint32_t* cumulative,
                            uint32_t total, uint32_t* counts) {
  const uint32_t number = static_cast<uint32_t>(row / p.queries), query = static_cast<uint32_t>(row % p.queries);
  for (int64_t shot = 4 * static_cast<int64_t>(threadIdx.x); shot < p.shots; shot += 4 * static_cast<int64_t>(blockDim.x)) {
    const PhiloxBlock random = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                                          {{p.layer, number, query, static_cast<uint32_t>(shot / 4)}});
    uint32_t target[4];
    Index found[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) target[i] = __umulhi(random.word[i], total);
    outcomes(cumulative, static_cast<Index>(p.n), target, found);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (shot + i < p.shots) atomicAdd(counts + found[i], 1u);
    }
  }
}

template <class T, bool kShared>
__global__ void __launch_bounds__(kManyThreads) measure_kernel(MeasureJob job) {
  using Real = decltype(to_real(T{}));
  using Index = std::conditional_t<kShared, int, int64_t>;
  const QuantumMeasureParams& p = job.params;
  const int64_t n = p.n;
  uint32_t* cumulative = kShared ? dynamic_shared<uint32_t>() : job.scratch + 2 * n * static_cast<int64_t>(blockIdx.x);
  uint32_t* counts = cumulative + n;
  const uint64_t seed = job.seed ? static_cast<uint64_t>(*job.seed) : 0;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* probabilities = static_cast<const T*>(job.tensors.probabilities) + row * n;
    T* frequencies = static_cast<T*>(job.tensors.frequencies) + row * n;
    const double sum = sum_in_order(probabilities, n);
    if (!is_distribution(sum, job.tolerance) || sum == 0.0) {
      const Real value = sum == 0.0 ? Real{0} : not_a_number<Real>();
      for (int64_t j = threadIdx.x; j < n; j += blockDim.x) frequencies[j] = from_real<T>(value);
      continue;
    }
    const double scale = 1073741824.0 / sum;
    for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
      const double x = to_real(probabilities[j]);
      cumulative[j] = x > 0.0 ? static_cast<uint32_t>(static_cast<int32_t>(x * scale)) + 1u : 0u;
      counts[j] = 0;
    }
    __syncthreads();
    const uint32_t total = cumulate(cumulative, static_cast<Index>(n));
    count_shots<Index>(p, seed, row, cumulative, total, counts);
    __syncthreads();
    for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
      const uint32_t count = counts[j];  // mostly 0, and division of doubles is slow
      frequencies[j] = from_real<T>(count ? static_cast<Real>(count / static_cast<double>(p.shots)) : Real{0});
    }
    __syncthreads();
  }
}

// How a call is laid out on the device: the same for its scratch and its launch.
struct Layout {
  bool shared;
  int64_t blocks;
  size_t bytes;  // of a block

  Layout(Status& status, const QuantumMeasureParams& p) : bytes(2 * sizeof(uint32_t) * static_cast<size_t>(p.n)) {
    const Device device = current_device(status);
    shared = bytes <= most_shared_bytes(device);
    blocks = std::min(p.rows, shared ? int64_t{1} << 20 : int64_t{device.multiprocessors});
  }
};

template <class T>
void measure(Status& status, const MeasureJob& job, const Layout& layout, void* stream) {
  const dim3 grid(static_cast<unsigned>(layout.blocks)), block(job.params.n <= kFewNumbers ? kFewThreads : kManyThreads);
  if (layout.shared) return launch(status, measure_kernel<T, true>, grid, block, layout.bytes, stream, job);
  launch(status, measure_kernel<T, false>, grid, block, 0, stream, job);
}

}  // namespace

size_t quantum_measure_scratch_bytes(const QuantumMeasureParams& params) {
  Status status;
  const Layout layout(status, params);
  return layout.shared ? 0 : layout.bytes * static_cast<size_t>(layout.blocks);
}

const char* quantum_measure(const QuantumMeasureParams& params, const QuantumMeasureTensors& tensors, const CudaCall& call) {
  Status status;
  const Layout layout(status, params);
  const MeasureJob job{params, tensors, call.seed, sum_tolerance(params.type), static_cast<uint32_t*>(call.scratch)};
  switch (params.type) {
    case DType::f64:
      measure<double>(status, job, layout, call.stream);
      break;
    case DType::f16:
      measure<__half>(status, job, layout, call.stream);
      break;
    case DType::bf16:
      measure<__nv_bfloat16>(status, job, layout, call.stream);
      break;
    default:
      measure<float>(status, job, layout, call.stream);
  }
  return status.text;
}

}  // namespace cuda
}  // namespace qexport
