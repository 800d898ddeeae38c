// QuantumNoise on the CPU: kSide rows lie side by side, element j of row r at x[j * kSide + r], so that every step of the
// butterflies works on whole vectors. With a unitary of all qubits each row has a density matrix: density_kernels.cc.
#include "qexport/quantum_noise.h"

#include <cmath>

#include "kernels.h"
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

// re and im: phases[j] = exp(-i sum of the azimuths of the bits of j).
template <class Real>
void fill_phases(const QuantumNoiseParams& p, Real* re, Real* im) {
  re[0] = 1, im[0] = 0;
  for (int k = 0; k < p.qubits; ++k) {
    const Real cosine = static_cast<Real>(std::cos(p.azimuths[k])), sine = static_cast<Real>(-std::sin(p.azimuths[k]));
    for (int64_t j = 0, bit = int64_t{1} << k; j < bit; ++j) {
      re[bit + j] = re[j] * cosine - im[j] * sine;
      im[bit + j] = re[j] * sine + im[j] * cosine;
    }
  }
}

// From probabilities to those of measuring each qubit along its own direction. `more` is as large as x with azimuths, and
// two rows larger.
template <class Real, int kWide>
void turn(const QuantumNoiseParams& p, Real* x, Real* more) {
  const int64_t states = int64_t{1} << p.qubits, count = states * kWide;
  for (int64_t i = 0; i < count; ++i) x[i] = std::sqrt(x[i]);
  Real* planes[2] = {x, p.azimuths ? more : nullptr};
  if (p.azimuths) {
    Real *re = more + count, *im = re + states;
    fill_phases(p, re, im);
    for (int64_t i = 0; i < count; ++i) more[i] = x[i] * im[i / kWide], x[i] *= re[i / kWide];
  }
  for (Real* plane : planes) {
    for (int k = 0; plane && k < p.qubits; ++k) {
      const Real c = static_cast<Real>(p.directions[2 * k]), s = static_cast<Real>(p.directions[2 * k + 1]);
      if (s != 0) butterfly<Real, kWide>(plane, states, k, c, s, s, -c);
    }
    for (int64_t i = 0; plane && i < count; ++i) plane[i] *= plane[i];
  }
  for (int64_t i = 0; p.azimuths && i < count; ++i) x[i] += more[i];
}

// x holds kWide rows of 2^qubits numbers, those from n on 0.
template <class Real, int kWide>
void apply(const QuantumNoiseParams& p, Real* x, Real* more) {
  const int64_t states = int64_t{1} << p.qubits;
  if (p.directions) turn<Real, kWide>(p, x, more);
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

template <class Real>
const DensityKernels<Real>& density() {
  if constexpr (sizeof(Real) == sizeof(double)) {
    return *kernels().density_f64;
  } else {
    return *kernels().density_f32;
  }
}

// Panels of the rows of the unitary, whose conjugates are the states that are found.
template <class Real>
struct Unitary {
  int64_t width, count;  // of a panel, of the panels
  Real *re, *im;         // (count, 2^qubits, width) each

  Unitary(const QuantumNoiseParams& p, Arena& arena) : width(density<Real>().width), count(0), re(nullptr), im(nullptr) {
    if (!p.maps) return;
    const int64_t states = int64_t{1} << p.qubits;
    count = (states + width - 1) / width;
    re = arena.take<Real>(count * states * width), im = arena.take<Real>(count * states * width);
  }

  template <class From>
  void pack(const From* unitary, int64_t states, int64_t panel) {
    for (int64_t j = 0; j < states; ++j) {
      for (int64_t s = 0; s < width; ++s) {
        const int64_t row = panel * width + s, place = (panel * states + j) * width + s;
        re[place] = row < states ? static_cast<Real>(unitary[2 * (row * states + j)]) : 0;
        im[place] = row < states ? -static_cast<Real>(unitary[2 * (row * states + j) + 1]) : 0;
      }
    }
  }
};

// What one thread works in.
template <class Real>
struct Work {
  Real *x, *more, *row, *rho_re, *rho_im;

  Work(const QuantumNoiseParams& p, Arena& arena) {
    const int64_t states = int64_t{1} << p.qubits, stride = density_stride(states);
    x = arena.take<Real>(p.maps ? states + 2 * density<Real>().width : states * kSide);
    more = arena.take<Real>(p.azimuths ? states * (kSide + 2) : 0);
    row = arena.take<Real>(p.n + kLanes);
    rho_re = arena.take<Real>(p.maps ? states * stride : 0);
    rho_im = arena.take<Real>(p.maps && !p.real_maps ? states * stride : 0);
    if (!p.maps || p.real_maps) rho_im = nullptr;
  }
};

// x, a row of probabilities, becomes that of the measurement behind the channel and the unitary.
template <class Real>
void apply_unitary(const QuantumNoiseParams& p, const Unitary<Real>& unitary, const Work<Real>& w) {
  const int64_t states = int64_t{1} << p.qubits;
  for (int64_t j = 0; j < states; ++j) w.x[j] = std::sqrt(w.x[j]);
  std::fill_n(w.x + states, unitary.width, Real{0});
  density<Real>().evolve(p.qubits, p.maps, w.x, w.rho_re, w.rho_im);
  for (int64_t panel = 0; panel < unitary.count; ++panel) {
    const int64_t place = panel * states * unitary.width;
    density<Real>().forms(states, w.rho_re, w.rho_im, unitary.re + place, unitary.im + place, w.x + panel * unitary.width);
  }
  // Rounding may leave a probability of 0 below it.
  for (int64_t j = 0; j < states; ++j) w.x[j] = std::max(w.x[j], Real{0});
}

// Rows first .. first + kWide - 1. Returns the first of them that does not hold probabilities, or -1.
template <class Real, int kWide>
int64_t noisy_rows(const QuantumNoiseParams& p, const QuantumNoiseTensors& t, const Unitary<Real>& unitary, int64_t first,
                   const Work<Real>& w) {
  Real *x = w.x, *row = w.row;
  const int64_t states = int64_t{1} << p.qubits;
  for (int r = 0; r < kWide; ++r) {
    const Real* given = read_probabilities(p.type, t.probabilities, first + r, p.n, row);
    if (!is_distribution(p.type, given, p.n)) return first + r;
    for (int64_t j = 0; j < p.n; ++j) x[j * kWide + r] = given[j];
  }
  std::fill(x + p.n * kWide, x + states * kWide, Real{0});
  if (kWide == 1 && p.maps) apply_unitary(p, unitary, w);
  apply<Real, kWide>(p, x, w.more);
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
size_t bytes_per_worker(const QuantumNoiseParams& p) {
  Arena arena{nullptr, 64};  // to align it
  const Work<Real> work(p, arena);
  return arena.used;
}

template <class Real>
size_t scratch_bytes(const QuantumNoiseParams& p, const ParallelFor& parallel) {
  Arena arena{nullptr, 64};
  const Unitary<Real> unitary(p, arena);
  return arena.used + bytes_per_worker<Real>(p) * static_cast<size_t>(parallel.max_threads);
}

template <class Real>
int64_t run(const QuantumNoiseParams& p, const QuantumNoiseTensors& t, void* scratch, const ParallelFor& parallel) {
  Arena shared{aligned(static_cast<char*>(scratch)), 0};
  Unitary<Real> unitary(p, shared);
  char* own_scratch = shared.base + shared.used;
  const int64_t states = int64_t{1} << p.qubits, side = p.maps ? 1 : kSide, groups = (p.rows + side - 1) / side;
  const int64_t steps = p.maps ? states * states : p.qubits * (p.azimuths ? 3 : p.directions ? 2 : 1) + 2;
  const int threads = p.rows * states * steps < kSerialWork ? 1 : parallel.max_threads;
  for_each_piece(unitary.count, threads, own_scratch, 0, parallel, [&](int64_t panel, char*) {
    if (p.unitary_type == DType::f64) return unitary.pack(static_cast<const double*>(p.unitary), states, panel);
    unitary.pack(static_cast<const float*>(p.unitary), states, panel);
  });
  FirstRow bad;
  for_each_piece(groups, threads, own_scratch, bytes_per_worker<Real>(p), parallel, [&](int64_t group, char* own) {
    Arena arena{aligned(own), 0};
    const Work<Real> work(p, arena);
    const int64_t first = group * side, end = std::min(p.rows, first + side);
    if (end - first == kSide) return bad.note(noisy_rows<Real, kSide>(p, t, unitary, first, work));
    for (int64_t r = first; r < end; ++r) bad.note(noisy_rows<Real, 1>(p, t, unitary, r, work));
  });
  return bad.row();
}

}  // namespace

size_t quantum_noise_cpu_scratch_bytes(const QuantumNoiseParams& params, const ParallelFor& parallel) {
  return params.type == DType::f64 ? scratch_bytes<double>(params, parallel) : scratch_bytes<float>(params, parallel);
}

int64_t quantum_noise_cpu(const QuantumNoiseParams& params, const QuantumNoiseTensors& tensors, void* scratch,
                          const ParallelFor& parallel) {
  return params.type == DType::f64 ? run<double>(params, tensors, scratch, parallel)
                                   : run<float>(params, tensors, scratch, parallel);
}

}  // namespace qexport
