// QuantumNoise on the CPU: kSide rows lie side by side, element j of row r at x[j * kSide + r], so that every step of the
// butterflies works on whole vectors.
#include "qexport/quantum_noise.h"

#include <cmath>

#include "probability_kernel.h"

namespace qexport {
namespace {

using namespace QEXPORT_ISA;

constexpr int kSide = 8;
// Element steps below which a call stays on the calling thread: waking a pool costs as much.
constexpr int64_t kSerialWork = int64_t{1} << 18;

// (a, b) -> (a00 a + a01 b, a10 a + a11 b) for the elements that differ in bit k of their index.
template <class Real, int kWide>
void butterfly(Real* x, int64_t states, int k, Real a00, Real a01, Real a10, Real a11) {
  const int64_t half = (int64_t{1} << k) * kWide, end = states * kWide;
  for (int64_t base = 0; base < end; base += 2 * half) {
    Real* __restrict__ low = x + base;
    Real* __restrict__ high = low + half;
    for (int64_t i = 0; i < half; i += kWide) {
      for (int64_t r = i; r < i + kWide; ++r) {
        const Real a = low[r], b = high[r];
        low[r] = a00 * a + a01 * b;
        high[r] = a10 * a + a11 * b;
      }
    }
  }
}

// x holds kWide rows of 2^qubits numbers, those from n on 0.
template <class Real, int kWide>
void apply(const QuantumNoiseParams& p, Real* x) {
  const int64_t states = int64_t{1} << p.qubits;
  if (p.hadamard) {
    const Real root = static_cast<Real>(std::sqrt(0.5));
    for (int64_t i = 0; i < states * kWide; ++i) x[i] = std::sqrt(x[i]);
    for (int k = 0; k < p.qubits; ++k) butterfly<Real, kWide>(x, states, k, root, root, root, -root);
    for (int64_t i = 0; i < states * kWide; ++i) x[i] *= x[i];
  }
  for (int k = 0; p.transitions && k < p.qubits; ++k) {
    const double up = p.transitions[2 * k], down = p.transitions[2 * k + 1];
    if (up == 0.0 && down == 0.0) continue;
    butterfly<Real, kWide>(x, states, k, static_cast<Real>(1.0 - up), static_cast<Real>(down), static_cast<Real>(up),
                           static_cast<Real>(1.0 - down));
  }
  if (p.uniform != 0.0) {
    Real sum[kWide] = {};
    for (int64_t i = 0; i < states * kWide; ++i) sum[i % kWide] += x[i];
    const Real kept = static_cast<Real>(1.0 - p.uniform), share = static_cast<Real>(std::ldexp(p.uniform, -p.qubits));
    for (int64_t i = 0; i < states * kWide; ++i) x[i] = kept * x[i] + share * sum[i % kWide];
  }
}

// Sums of the elements [begin, end) of each row.
template <class Real, int kWide>
void sums(const Real* x, int64_t begin, int64_t end, Real* sum) {
  for (int r = 0; r < kWide; ++r) sum[r] = 0;
  for (int64_t j = begin; j < end; ++j) {
    for (int r = 0; r < kWide; ++r) sum[r] += x[j * kWide + r];
  }
}

// Rows first .. first + kWide - 1. Returns the first of them that does not hold probabilities, or -1.
template <class Real, int kWide>
int64_t noisy_rows(const QuantumNoiseParams& p, const QuantumNoiseTensors& t, int64_t first, Real* x, Real* row) {
  const int64_t states = int64_t{1} << p.qubits;
  for (int r = 0; r < kWide; ++r) {
    const Real* given = read_probabilities(p.type, t.probabilities, first + r, p.n, row);
    if (!is_distribution(p.type, given, p.n)) return first + r;
    for (int64_t j = 0; j < p.n; ++j) x[j * kWide + r] = given[j];
  }
  std::fill(x + p.n * kWide, x + states * kWide, Real{0});
  apply<Real, kWide>(p, x);
  Real sum[kWide], factor[kWide];
  sums<Real, kWide>(x, p.n, states, sum);
  if (t.leak) std::copy_n(sum, kWide, static_cast<Real*>(t.leak) + first);
  sums<Real, kWide>(x, 0, p.n, sum);
  for (int r = 0; r < kWide; ++r) factor[r] = p.renormalize && sum[r] > 0 ? 1 / sum[r] : 1;
  for (int r = 0; r < kWide; ++r) {
    for (int64_t j = 0; j < p.n; ++j) row[j] = x[j * kWide + r] * factor[r];
    write_probabilities(p.type, row, first + r, p.n, t.noisy);
  }
  return -1;
}

template <class Real>
int64_t run(const QuantumNoiseParams& p, const QuantumNoiseTensors& t, void* scratch, size_t per_worker,
            const ParallelFor& parallel) {
  const int64_t states = int64_t{1} << p.qubits, groups = (p.rows + kSide - 1) / kSide;
  const bool serial = p.rows * states * (p.qubits * (p.hadamard ? 2 : 1) + 2) < kSerialWork;
  FirstRow bad;
  for_each_piece(groups, serial ? 1 : parallel.max_threads, static_cast<char*>(scratch), per_worker, parallel,
                 [&](int64_t group, char* own) {
                   Arena arena{aligned(own), 0};
                   Real* x = arena.take<Real>(states * kSide);
                   Real* row = arena.take<Real>(p.n + kLanes);
                   const int64_t first = group * kSide, end = std::min(p.rows, first + kSide);
                   if (end - first == kSide) return bad.note(noisy_rows<Real, kSide>(p, t, first, x, row));
                   for (int64_t r = first; r < end; ++r) bad.note(noisy_rows<Real, 1>(p, t, r, x, row));
                 });
  return bad.row();
}

size_t bytes_per_worker(const QuantumNoiseParams& p) {
  const size_t real = p.type == DType::f64 ? sizeof(double) : sizeof(float);
  return real * ((size_t{1} << p.qubits) * kSide + static_cast<size_t>(p.n + kLanes)) + 4 * 64;
}

}  // namespace

size_t quantum_noise_cpu_scratch_bytes(const QuantumNoiseParams& params, const ParallelFor& parallel) {
  return bytes_per_worker(params) * static_cast<size_t>(parallel.max_threads);
}

int64_t quantum_noise_cpu(const QuantumNoiseParams& params, const QuantumNoiseTensors& tensors, void* scratch,
                          const ParallelFor& parallel) {
  const auto run_as = params.type == DType::f64 ? run<double> : run<float>;
  return run_as(params, tensors, scratch, bytes_per_worker(params), parallel);
}

}  // namespace qexport
