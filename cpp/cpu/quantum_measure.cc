// QuantumMeasure on the CPU: per row a cumulative distribution in fixed point, and a search in it per shot.
#include "qexport/quantum_measure.h"

#include "probability_kernel.h"
#include "qexport/philox.h"

namespace qexport {
namespace {

using namespace QEXPORT_ISA;

constexpr int64_t kRows = 8;  // of a piece of work
// Element steps below which a call stays on the calling thread: waking a pool costs as much.
constexpr int64_t kSerialWork = int64_t{1} << 16;

// cumulative[j] = sum of floor(2^30 p_i / sum p) + 1 over i <= j with p_i > 0. Returns its last element; 0 for a row of
// zeros. The sum runs in the order of j: every program that computes it so has the same bits.
template <class Real>
uint32_t cumulate(const Real* p, int64_t n, uint32_t* cumulative) {
  double sum = 0.0;
  for (int64_t j = 0; j < n; ++j) sum += static_cast<double>(p[j]);
  if (!(sum > 0.0)) return 0;
  const double scale = 1073741824.0 / sum;
  uint32_t total = 0;
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t steps = static_cast<uint32_t>(static_cast<int32_t>(static_cast<double>(p[j]) * scale)) + 1u;
    total += p[j] > 0 ? steps : 0u;
    cumulative[j] = total;
  }
  return total;
}

// found[i] = the first j with cumulative[j] > target[i]. Without branches, which no processor could foresee, and four at a
// time, since each step waits for the one before.
void outcomes(const uint32_t* cumulative, int64_t n, const uint32_t (&target)[4], int64_t (&found)[4]) {
  for (int64_t& place : found) place = 0;
  while (n > 1) {
    const int64_t half = n / 2;
    for (int i = 0; i < 4; ++i) found[i] += cumulative[found[i] + half - 1] <= target[i] ? half : 0;
    n -= half;
  }
}

template <class Real>
void measure_row(const QuantumMeasureParams& p, int64_t row, const Real* probabilities, uint32_t* cumulative,
                 uint32_t* counts) {
  std::fill_n(counts, p.n, 0u);
  const uint32_t total = cumulate(probabilities, p.n, cumulative);
  if (total == 0) return;
  const uint64_t seed = static_cast<uint64_t>(p.seed);
  for (int64_t shot = 0; shot < p.shots; shot += 4) {
    const PhiloxBlock random = philox4x32(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                                          {{p.layer, static_cast<uint32_t>(row / p.queries),
                                            static_cast<uint32_t>(row % p.queries), static_cast<uint32_t>(shot / 4)}});
    uint32_t target[4];
    int64_t found[4];
    for (int i = 0; i < 4; ++i) target[i] = static_cast<uint32_t>((uint64_t{random.word[i]} * total) >> 32);
    outcomes(cumulative, p.n, target, found);
    for (int64_t i = 0; i < std::min<int64_t>(4, p.shots - shot); ++i) ++counts[found[i]];
  }
}

template <class Real>
int64_t run(const QuantumMeasureParams& p, const QuantumMeasureTensors& t, void* scratch, size_t per_worker,
            const ParallelFor& parallel) {
  const int64_t pieces = (p.rows + kRows - 1) / kRows;
  const bool serial = p.rows * (p.n + 8 * p.shots) < kSerialWork;
  FirstRow bad;
  for_each_piece(pieces, serial ? 1 : parallel.max_threads, static_cast<char*>(scratch), per_worker, parallel,
                 [&](int64_t piece, char* own) {
                   Arena arena{aligned(own), 0};
                   Real* buffer = arena.take<Real>(p.n + kLanes);
                   uint32_t* cumulative = arena.take<uint32_t>(p.n);
                   uint32_t* counts = arena.take<uint32_t>(p.n);
                   for (int64_t r = piece * kRows; r < std::min(p.rows, (piece + 1) * kRows); ++r) {
                     const Real* row = read_probabilities(p.type, t.probabilities, r, p.n, buffer);
                     if (!is_distribution(p.type, row, p.n)) return bad.note(r);
                     measure_row(p, r, row, cumulative, counts);
                     const double shots = static_cast<double>(p.shots);
                     for (int64_t j = 0; j < p.n; ++j) buffer[j] = static_cast<Real>(counts[j] / shots);
                     write_probabilities(p.type, buffer, r, p.n, t.frequencies);
                   }
                 });
  return bad.row();
}

size_t bytes_per_worker(const QuantumMeasureParams& p) {
  const size_t real = p.type == DType::f64 ? sizeof(double) : sizeof(float), n = static_cast<size_t>(p.n);
  return real * (n + kLanes) + 2 * sizeof(uint32_t) * n + 4 * 64;
}

}  // namespace

size_t quantum_measure_cpu_scratch_bytes(const QuantumMeasureParams& params, const ParallelFor& parallel) {
  return bytes_per_worker(params) * static_cast<size_t>(parallel.max_threads);
}

int64_t quantum_measure_cpu(const QuantumMeasureParams& params, const QuantumMeasureTensors& tensors, void* scratch,
                            const ParallelFor& parallel) {
  const auto run_as = params.type == DType::f64 ? run<double> : run<float>;
  return run_as(params, tensors, scratch, bytes_per_worker(params), parallel);
}

}  // namespace qexport
