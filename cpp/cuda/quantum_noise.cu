// QuantumNoise on CUDA: a block holds rows side by side in shared memory, and a thread takes 16 numbers of them at a time,
// those whose places differ in four bits (8 of wide or complex ones): as many qubits for one reading and writing. A row that
// is too long for that lies in scratch, one for each block. With a unitary of all qubits each row has a density matrix:
// quantum_noise_density.cu.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "quantum_noise.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kThreads = 256, kMostThreads = 512;
constexpr int kMostRows = kThreads;  // of a block: each has a thread at least
constexpr int kBlockBits = 12;       // a block has 2^12 numbers, or more where a row has
constexpr int kManyBits = 16;        // of which a block holds less in shared memory, whatever the device
constexpr int64_t kMostBlocks = int64_t{1} << 20;

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

// The rows of a block, 2^row_bits of 2^qubits numbers each, in shared memory or in scratch. Twisted ones are complex.
template <class Element, bool kInShared, bool kIsTwisted>
struct Rows {
  using Real = Element;
  using Index = std::conditional_t<kInShared, int, int64_t>;
  static constexpr bool kShared = kInShared, kTwisted = kIsTwisted;
  static constexpr int kBits = kTwisted || sizeof(Real) == 8 ? 3 : 4, kGroup = 1 << kBits;  // qubits that one pass takes

  Real *re, *im;
  int row_bits, qubits;

  // Where number i of the block lies: a gap behind each group keeps threads that read whole groups in different banks.
  static __host__ __device__ __forceinline__ Index place(Index i) { return kShared ? i + (i >> kBits) : i; }
  // Of all numbers, their real or imaginary parts.
  static __host__ __device__ int64_t plane(int bits) {
    const int64_t numbers = int64_t{1} << bits;
    return kShared ? numbers + (numbers >> kBits) : numbers;
  }
  static __host__ __device__ int64_t bytes(int bits) {
    return plane(bits) * static_cast<int64_t>(sizeof(Real)) * (kTwisted ? 2 : 1);
  }
  __device__ Index count() const { return Index{1} << (row_bits + qubits); }
};

// The sum over the threads of a row, which are 2^k neighbours, on all of them.
template <class Sum>
__device__ Sum row_sum(Sum x, int threads) {
  __shared__ Sum parts[kWarp];
  for (int step = min(threads, kWarp) / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullWarp, x, step);
  if (threads <= kWarp) return x;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, warps = threads / kWarp;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) parts[warp] = x;
  __syncthreads();
  Sum sum = 0;
  for (int i = 0; i < warps; ++i) sum += parts[warp / warps * warps + i];
  return sum;
}

// What a pass does to a pair of numbers whose places differ in the bit of a qubit: transitions of probabilities, or a turn
// of amplitudes, of which probabilities are left in the end.
template <class Real>
struct Flip {
  static constexpr bool kTwisted = false;
  static __device__ __forceinline__ void apply(const QubitNoise<Real>& q, Real& a, Real& b, Real&, Real&) {
    const Real low = a, high = b;
    a = q.stay0 * low + q.fall * high;
    b = q.rise * low + q.stay1 * high;
  }
  static __device__ __forceinline__ Real found(Real re, Real) { return re; }
};
template <class Real, bool kIsTwisted>
struct Turn {
  static constexpr bool kTwisted = kIsTwisted;
  static __device__ __forceinline__ void apply(const QubitNoise<Real>& q, Real& a, Real& b, Real& a_im, Real& b_im) {
    const Real low = a;
    Real high = b;
    if (kTwisted) {
      const Real low_im = a_im, high_im = high * q.phase_im + b_im * q.phase_re;
      high = high * q.phase_re - b_im * q.phase_im;
      a_im = q.cosine * low_im + q.sine * high_im;
      b_im = q.sine * low_im - q.cosine * high_im;
    }
    a = q.cosine * low + q.sine * high;
    b = q.sine * low - q.cosine * high;
  }
  static __device__ __forceinline__ Real found(Real re, Real im) { return kTwisted ? re * re + im * im : re * re; }
};

// Every qubit of every row.
template <class Step, class Rows>
__device__ void passes(const Rows& rows, const QubitNoise<typename Rows::Real>* qubit) {
  using Real = typename Rows::Real;
  using Index = typename Rows::Index;
  constexpr int kBits = Rows::kBits, kGroup = Rows::kGroup;
  const int bits = rows.row_bits + rows.qubits;
  for (int done = 0; done < rows.qubits; done += kBits) {
    // The last pass may see qubits that are done. A block has 2^(2 kBits) numbers at least, so `first` is 0 or >= kBits, and
    // the places of a group are equally far from each other.
    const int first = min(done, bits - kBits);
    const Index step = first ? Rows::place(Index{1} << first) : Index{1};
    const bool last = done + kBits >= rows.qubits;
    for (Index group = threadIdx.x; group < rows.count() >> kBits; group += blockDim.x) {
      const Index low = group & ((Index{1} << first) - 1), begin = Rows::place(((group - low) << kBits) + low);
      Real re[kGroup], im[kGroup];
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        re[e] = rows.re[begin + e * step];
        im[e] = Step::kTwisted ? rows.im[begin + e * step] : Real{0};
      }
#pragma unroll
      for (int bit = 0; bit < kBits; ++bit) {
        if (first + bit < done || first + bit >= rows.qubits) continue;
#pragma unroll
        for (int e = 0; e < kGroup; ++e) {
          if (e >> bit & 1) continue;
          const int pair = e | 1 << bit;
          Step::apply(qubit[first + bit], re[e], re[pair], im[e], im[pair]);
        }
      }
#pragma unroll
      for (int e = 0; e < kGroup; ++e) {
        rows.re[begin + e * step] = last ? Step::found(re[e], im[e]) : re[e];
        if (Step::kTwisted && !last) rows.im[begin + e * step] = im[e];
      }
    }
    __syncthreads();
  }
}

template <class T, class Rows, class Real>
__device__ void read_rows(const NoiseJob<Real>& job, int64_t first, const Rows& rows) {
  using Index = typename Rows::Index;
  const T* source = static_cast<const T*>(job.source);
  const Index mask = (Index{1} << rows.qubits) - 1;
#pragma unroll 8
  for (Index i = threadIdx.x; i < rows.count(); i += blockDim.x) {
    const int64_t row = first + static_cast<int64_t>(i >> rows.qubits), j = i & mask;
    rows.re[Rows::place(i)] =
        row < job.rows && j < job.width ? static_cast<Real>(to_real(source[row * job.width + j])) : Real{0};
  }
}

// p <- scale p + shift, a pair for each row.
template <class T, class Rows, class Real>
__device__ void write_rows(const NoiseJob<Real>& job, int64_t first, const Rows& rows, const Real* scale,
                           const Real* shift) {
  using Index = typename Rows::Index;
  T* noisy = static_cast<T*>(job.noisy);
  const Index mask = (Index{1} << rows.qubits) - 1;
#pragma unroll 4
  for (Index i = threadIdx.x; i < rows.count(); i += blockDim.x) {
    const int side = static_cast<int>(i >> rows.qubits);
    const int64_t row = first + side, j = i & mask;
    if (row < job.rows && j < job.n)
      noisy[row * job.n + j] = from_real<T>(rows.re[Rows::place(i)] * scale[side] + shift[side]);
  }
}

template <class Rows>
__global__ void __launch_bounds__(kMostThreads)
    noise_kernel(const __grid_constant__ NoiseJob<typename Rows::Real> job, int row_bits) {
  using Real = typename Rows::Real;
  using Index = typename Rows::Index;
  __shared__ Real scale[kMostRows], shift[kMostRows];
  char* memory = Rows::kShared ? dynamic_shared<char>()
                               : reinterpret_cast<char*>(job.scratch) + blockIdx.x * Rows::bytes(row_bits + job.qubits);
  Real* re = reinterpret_cast<Real*>(memory);
  const Rows rows{re, re + Rows::plane(row_bits + job.qubits), row_bits, job.qubits};
  // Behind reading, threads keep to one row of the block.
  const int threads = static_cast<int>(blockDim.x) >> row_bits, side = static_cast<int>(threadIdx.x) / threads;
  const int own = static_cast<int>(threadIdx.x) % threads;
  const Index states = Index{1} << job.qubits, begin = static_cast<Index>(side) * states;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) << row_bits; first < job.rows;
       first += static_cast<int64_t>(gridDim.x) << row_bits) {
    if constexpr (std::is_same_v<Real, double>) {
      read_rows<double>(job, first, rows);
    } else if (job.source_type == DType::f32) {
      read_rows<float>(job, first, rows);
    } else if (job.source_type == DType::f16) {
      read_rows<__half>(job, first, rows);
    } else {
      read_rows<__nv_bfloat16>(job, first, rows);
    }
    __syncthreads();
    double given = 0.0;
    for (Index j = own; j < states; j += threads) {
      const Index at = Rows::place(begin + j);
      const Real x = rows.re[at];
      given += summand(x);
      if (job.turned) rows.re[at] = root(x);
      if (Rows::kTwisted) rows.im[at] = 0;
    }
    given = row_sum(given, threads);
    __syncthreads();
    if (job.turned) passes<Turn<Real, Rows::kTwisted>>(rows, job.qubit);
    if (job.flipped) passes<Flip<Real>>(rows, job.qubit);
    Real kept = 0, leak = 0;
    for (Index j = own; j < states; j += threads) {
      const Real x = rows.re[Rows::place(begin + j)];
      if (j < job.n) {
        kept += x;
      } else {
        leak += x;
      }
    }
    kept = row_sum(kept, threads), leak = row_sum(leak, threads);
    if (own == 0) {
      const Real everywhere = job.share * (kept + leak);
      kept = job.kept * kept + static_cast<Real>(job.n) * everywhere;
      leak = job.kept * leak + static_cast<Real>(static_cast<int64_t>(states) - job.n) * everywhere;
      const Real factor = job.renormalize && kept > 0 ? 1 / kept : 1;
      const bool good = is_distribution(given, job.tolerance);
      scale[side] = factor * job.kept, shift[side] = good ? factor * everywhere : not_a_number<Real>();
      if (job.leak && first + side < job.rows) job.leak[first + side] = good ? leak : not_a_number<Real>();
    }
    __syncthreads();
    if constexpr (std::is_same_v<Real, double>) {
      write_rows<double>(job, first, rows, scale, shift);
    } else if (job.type == DType::f32) {
      write_rows<float>(job, first, rows, scale, shift);
    } else if (job.type == DType::f16) {
      write_rows<__half>(job, first, rows, scale, shift);
    } else {
      write_rows<__nv_bfloat16>(job, first, rows, scale, shift);
    }
    __syncthreads();
  }
}

// Calls visit(Rows{}, row_bits, blocks) with the layout of a job on the device: the same for its scratch and its launch.
template <class Real, bool kTwisted, class Visit>
void with_layout(Status& status, const NoiseJob<Real>& job, const Visit& visit) {
  using InShared = Rows<Real, true, kTwisted>;
  int row_bits = 0;
  while (row_bits + job.qubits < kBlockBits && 2 << row_bits <= kMostRows) ++row_bits;
  const Device device = current_device(status);
  const int64_t blocks = ceil_div(job.rows, int64_t{1} << row_bits);
  if (row_bits + job.qubits < kManyBits &&
      static_cast<size_t>(InShared::bytes(row_bits + job.qubits)) <= most_shared_bytes(device)) {
    return visit(InShared{}, row_bits, std::min(blocks, kMostBlocks));
  }
  visit(Rows<Real, false, kTwisted>{}, row_bits, std::min<int64_t>(blocks, device.multiprocessors));
}
template <class Real, class Visit>
void with_layout(Status& status, const NoiseJob<Real>& job, const Visit& visit) {
  if (job.twisted) return with_layout<Real, true>(status, job, visit);
  with_layout<Real, false>(status, job, visit);
}

template <class Real>
const char* run(const QuantumNoiseParams& p, const QuantumNoiseTensors& t, const CudaCall& call) {
  Status status;
  if (p.qubits > kMaxQubits) status.fail("probabilities must have rows of at most 2^40 numbers on CUDA");
  if (!status.ok() || p.rows == 0) return status.text;
  if (p.maps) {
    density_matrices<Real>(status, p, t, call);
  } else {
    NoiseJob<Real> job = noise_job<Real>(p, t);
    job.scratch = static_cast<Real*>(call.scratch);
    closed_form(status, job, call.stream);
  }
  return status.text;
}

}  // namespace

template <class Real>
NoiseJob<Real> noise_job(const QuantumNoiseParams& p, const QuantumNoiseTensors& t) {
  NoiseJob<Real> job{};
  job.source = t.probabilities, job.source_type = job.type = p.type;
  job.rows = p.rows, job.width = job.n = p.n;
  job.tolerance = sum_tolerance(p.type);
  job.noisy = t.noisy, job.leak = static_cast<Real*>(t.leak);
  job.qubits = p.qubits;
  job.turned = p.directions != nullptr, job.twisted = job.turned && p.azimuths != nullptr;
  job.renormalize = p.renormalize;
  job.kept = static_cast<Real>(1.0 - p.uniform), job.share = static_cast<Real>(std::ldexp(p.uniform, -p.qubits));
  for (int k = 0; k < p.qubits; ++k) {
    QubitNoise<Real>& q = job.qubit[k];
    const double azimuth = job.twisted ? p.azimuths[k] : 0.0;
    q.cosine = static_cast<Real>(job.turned ? p.directions[2 * k] : 1.0);
    q.sine = static_cast<Real>(job.turned ? p.directions[2 * k + 1] : 0.0);
    q.phase_re = static_cast<Real>(std::cos(azimuth)), q.phase_im = static_cast<Real>(-std::sin(azimuth));
    const double up = p.transitions ? p.transitions[2 * k] : 0.0, down = p.transitions ? p.transitions[2 * k + 1] : 0.0;
    job.flipped = job.flipped || up != 0.0 || down != 0.0;
    q.stay0 = static_cast<Real>(1.0 - up), q.fall = static_cast<Real>(down);
    q.rise = static_cast<Real>(up), q.stay1 = static_cast<Real>(1.0 - down);
  }
  return job;
}

template <class Real>
void closed_form(Status& status, const NoiseJob<Real>& job, void* stream) {
  with_layout(status, job, [&](auto rows, int row_bits, int64_t blocks) {
    using Layout = decltype(rows);
    const int bits = row_bits + job.qubits;
    launch(status, noise_kernel<Layout>, static_cast<unsigned>(blocks), bits <= kBlockBits ? kThreads : kMostThreads,
           Layout::kShared ? static_cast<size_t>(Layout::bytes(bits)) : 0, stream, job, row_bits);
  });
}

template <class Real>
size_t closed_form_scratch_bytes(Status& status, const NoiseJob<Real>& job) {
  size_t bytes = 0;
  with_layout(status, job, [&](auto rows, int row_bits, int64_t blocks) {
    using Layout = decltype(rows);
    if (!Layout::kShared) bytes = static_cast<size_t>(Layout::bytes(row_bits + job.qubits) * blocks);
  });
  return bytes;
}

template NoiseJob<float> noise_job(const QuantumNoiseParams& p, const QuantumNoiseTensors& t);
template NoiseJob<double> noise_job(const QuantumNoiseParams& p, const QuantumNoiseTensors& t);
template void closed_form(Status& status, const NoiseJob<float>& job, void* stream);
template void closed_form(Status& status, const NoiseJob<double>& job, void* stream);
template size_t closed_form_scratch_bytes(Status& status, const NoiseJob<float>& job);
template size_t closed_form_scratch_bytes(Status& status, const NoiseJob<double>& job);

size_t quantum_noise_scratch_bytes(const QuantumNoiseParams& params) {
  Status status;
  if (params.qubits > kMaxQubits) return 0;
  const bool wide = params.type == DType::f64;
  if (params.maps) return wide ? density_scratch_bytes<double>(params) : density_scratch_bytes<float>(params);
  return wide ? closed_form_scratch_bytes(status, noise_job<double>(params, {}))
              : closed_form_scratch_bytes(status, noise_job<float>(params, {}));
}

const char* quantum_noise(const QuantumNoiseParams& params, const QuantumNoiseTensors& tensors, const CudaCall& call) {
  return params.type == DType::f64 ? run<double>(params, tensors, call) : run<float>(params, tensors, call);
}

}  // namespace cuda
}  // namespace qexport
