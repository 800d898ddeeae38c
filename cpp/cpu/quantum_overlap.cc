// QuantumOverlap on the CPU: keys lie side by side in panels, and a query with its density matrix or its products meets one
// panel at a time.
#include "qexport/quantum_overlap.h"

#include <cmath>

#include "density_access.h"
#include "probability_kernel.h"

namespace qexport {
namespace {

using namespace QEXPORT_ISA;

// Element steps below which a call stays on the calling thread: waking a pool costs as much.
constexpr int64_t kSerialWork = int64_t{1} << 18;

// Keys as states in panels, and whether each is one: a row of zeros is none.
template <class Real>
struct Keys {
  int64_t states, width, count;  // of a key, of a panel, of the panels of one batch
  Real *panels, *alive;          // (batch, count, states, width) and (batch, count, width)
  Real* weights;                 // (states,): see DensityKernels::dephased; null with maps, or without any noise

  Keys(const QuantumOverlapParams& p, Arena& arena)
      : states(int64_t{1} << p.qubits), width(density<Real>().width), count((p.keys + width - 1) / width) {
    panels = arena.take<Real>(p.batch * count * states * width);
    alive = arena.take<Real>(p.batch * count * width);
    bool dephased = false;
    for (int k = 0; p.coherences && k < p.qubits; ++k) dephased = dephased || p.coherences[k] != 1.0;
    weights = dephased ? arena.take<Real>(states) : nullptr;
  }

  const Real* panel(int64_t batch, int64_t i) const { return panels + (batch * count + i) * states * width; }
};

// `row` of n numbers as a state of norm one, or zeros where it has none. Returns 1, or 0 then.
template <class Real>
Real normalise(const Real* row, int64_t n, Real* state, int64_t step) {
  double squares = 0.0;
  for (int64_t j = 0; j < n; ++j) squares += static_cast<double>(row[j]) * static_cast<double>(row[j]);
  const double factor = squares == 0.0 ? 0.0 : 1.0 / std::sqrt(squares);
  for (int64_t j = 0; j < n; ++j) state[j * step] = static_cast<Real>(static_cast<double>(row[j]) * factor);
  return squares == 0.0 ? 0 : 1;
}

// What one thread works in.
template <class Real>
struct Work {
  Real *row, *state, *found, *products, *rho_re, *rho_im;

  Work(const QuantumOverlapParams& p, Arena& arena) {
    const int64_t states = int64_t{1} << p.qubits, stride = density_stride(states), width = density<Real>().width;
    row = arena.take<Real>(p.size + kLanes);
    state = arena.take<Real>(states + width);
    found = arena.take<Real>((p.keys + width - 1) / width * width + kLanes);
    products = arena.take<Real>(p.maps ? 0 : states * width / 2);
    rho_re = arena.take<Real>(p.maps ? states * stride : 0);
    rho_im = p.maps && !p.real_maps ? arena.take<Real>(states * stride) : nullptr;
  }
};

template <class Real>
void pack_panel(const QuantumOverlapParams& p, const void* data, const Keys<Real>& keys, int64_t place,
                const Work<Real>& w) {
  const int64_t batch = place / keys.count, first = place % keys.count * keys.width;
  Real* panel = keys.panels + place * keys.states * keys.width;
  std::fill_n(panel, keys.states * keys.width, Real{0});
  for (int64_t s = 0; s < keys.width; ++s) {
    Real& alive = keys.alive[place * keys.width + s];
    alive = 0;
    if (first + s >= p.keys) continue;
    const Real* row = read_probabilities(p.type, data, batch * p.keys + first + s, p.size, w.row);
    alive = normalise(row, p.size, panel + s, keys.width);
  }
}

// weights[j] = product of (1 + c) / 2 over the qubits whose bit of j is 0 and (1 - c) / 2 over the others.
template <class Real>
void fill_weights(const QuantumOverlapParams& p, Real* weights) {
  weights[0] = 1;
  for (int k = 0; k < p.qubits; ++k) {
    const Real same = static_cast<Real>((1.0 + p.coherences[k]) / 2.0),
               other = static_cast<Real>((1.0 - p.coherences[k]) / 2.0);
    for (int64_t j = 0, bit = int64_t{1} << k; j < bit; ++j) {
      weights[bit + j] = weights[j] * other;
      weights[j] *= same;
    }
  }
}

template <class Real>
void overlaps_of_query(const QuantumOverlapParams& p, const QuantumOverlapTensors& t, const Keys<Real>& keys, int64_t query,
                       const Work<Real>& w) {
  const int64_t batch = query / p.queries;
  std::fill_n(w.state, keys.states + keys.width, Real{0});
  const Real alive = normalise(read_probabilities(p.type, t.queries, query, p.size, w.row), p.size, w.state, int64_t{1});
  if (p.maps) density<Real>().evolve(p.qubits, p.maps, w.state, w.rho_re, w.rho_im);
  const Real kept = static_cast<Real>(1.0 - p.uniform), share = static_cast<Real>(std::ldexp(p.uniform, -p.qubits));
  for (int64_t i = 0; i < keys.count; ++i) {
    Real* found = w.found + i * keys.width;
    if (p.maps) {
      density<Real>().forms(keys.states, w.rho_re, w.rho_im, keys.panel(batch, i), nullptr, found);
    } else {
      density<Real>().dephased(p.qubits, keys.weights, w.state, keys.panel(batch, i), w.products, found);
    }
    const Real* both = keys.alive + (batch * keys.count + i) * keys.width;
    for (int64_t s = 0; s < keys.width; ++s) {
      const Real overlap = kept * found[s] + share * alive * both[s];
      found[s] = overlap < 0 ? Real{0} : overlap > 1 ? Real{1} : overlap;
    }
  }
  write_probabilities(p.type, w.found, query, p.keys, t.overlaps);
}

template <class Real>
size_t bytes_per_worker(const QuantumOverlapParams& p) {
  Arena arena{nullptr, 64};  // to align it
  const Work<Real> work(p, arena);
  return arena.used;
}

template <class Real>
size_t scratch_bytes(const QuantumOverlapParams& p, const ParallelFor& parallel) {
  Arena arena{nullptr, 64};
  const Keys<Real> keys(p, arena);
  return arena.used + bytes_per_worker<Real>(p) * static_cast<size_t>(parallel.max_threads);
}

template <class Real>
void run(const QuantumOverlapParams& p, const QuantumOverlapTensors& t, void* scratch, const ParallelFor& parallel) {
  Arena shared{aligned(static_cast<char*>(scratch)), 0};
  const Keys<Real> keys(p, shared);
  const int64_t queries = p.batch * p.queries;
  const int64_t steps = p.maps ? (p.keys / 2 + 8 * p.qubits) * keys.states : p.keys * (p.qubits + 2);
  const int threads = queries * keys.states * steps < kSerialWork ? 1 : parallel.max_threads;
  const auto for_each = [&](int64_t total, const auto& body) {
    for_each_piece(total, threads, shared.base + shared.used, bytes_per_worker<Real>(p), parallel,
                   [&](int64_t i, char* own) {
                     Arena arena{aligned(own), 0};
                     body(i, Work<Real>(p, arena));
                   });
  };
  if (keys.weights) fill_weights(p, keys.weights);
  for_each(p.batch * keys.count, [&](int64_t i, const Work<Real>& work) { pack_panel(p, t.keys, keys, i, work); });
  for_each(queries, [&](int64_t query, const Work<Real>& work) { overlaps_of_query(p, t, keys, query, work); });
}

}  // namespace

size_t quantum_overlap_cpu_scratch_bytes(const QuantumOverlapParams& params, const ParallelFor& parallel) {
  return params.type == DType::f64 ? scratch_bytes<double>(params, parallel) : scratch_bytes<float>(params, parallel);
}

void quantum_overlap_cpu(const QuantumOverlapParams& params, const QuantumOverlapTensors& tensors, void* scratch,
                         const ParallelFor& parallel) {
  return params.type == DType::f64 ? run<double>(params, tensors, scratch, parallel)
                                   : run<float>(params, tensors, scratch, parallel);
}

}  // namespace qexport
