// Rows of probabilities side by side, in shared memory or in scratch, and what QuantumNoise does to pairs of their numbers.
#pragma once

#include <type_traits>

#include "quantum_noise.cuh"

namespace qexport {
namespace cuda {

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

// The rows of a block, 2^row_bits of 2^qubits numbers each, in shared memory or in scratch. Twisted ones are complex.
template <class Element, bool kInShared, bool kIsTwisted>
struct NoiseRows {
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

}  // namespace cuda
}  // namespace qexport
