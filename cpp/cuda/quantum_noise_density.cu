// Density matrices of noisy registers on CUDA, some rows at a time in scratch; the closed form does what is last.
#include <algorithm>

#include "quantum_noise_density.cuh"

namespace qexport {
namespace cuda {
namespace {

template <class T, class Real>
void find_amplitudes(Status& status, const QuantumNoiseParams& p, const void* rows, const DensityMatrices<Real>& m,
                     void* stream) {
  launch(status, amplitudes_kernel<T, Real>, static_cast<unsigned>(m.rows), kDensityThreads, 0, stream,
         static_cast<const T*>(rows), p.n, p.qubits, sum_tolerance(p.type), m.amplitudes);
}

template <class Real, int kQubits>
void map_qubits(Status& status, const QuantumNoiseParams& p, int qubit, const DensityMatrices<Real>& m, void* stream) {
  const int64_t groups = int64_t{1} << 2 * (p.qubits - kQubits);
  const dim3 grid(static_cast<unsigned>(ceil_div(groups, int64_t{kDensityThreads})), static_cast<unsigned>(m.rows));
  const double* map = p.maps + 32 * qubit;
  if constexpr (kQubits == 2) {
    const QubitMaps<Real, 2> maps{{QubitMap<Real>(map), QubitMap<Real>(map + 32)}};
    launch(status, map_kernel<Real, 2>, grid, kDensityThreads, 0, stream, m, maps, qubit, qubit == 0);
  } else {
    const QubitMaps<Real, 1> maps{{QubitMap<Real>(map)}};
    launch(status, map_kernel<Real, 1>, grid, kDensityThreads, 0, stream, m, maps, qubit, qubit == 0);
  }
}

template <class Real>
void find_forms(Status& status, const QuantumNoiseParams& p, const DensityMatrices<Real>& m, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(int64_t{1} << p.qubits, int64_t{kFormEdge})),
                  static_cast<unsigned>(m.rows));
  const auto kernel = p.real_maps ? forms_kernel<Real, false> : forms_kernel<Real, true>;
  launch(status, kernel, grid, kDensityThreads, sizeof(FormTile<Real>), stream, m);
}

template <class Real, class Given>
void send(Status& status, const Given* from, int64_t count, Real* to, void* stream) {
  ParameterPiece<Real> piece;
  for (int64_t begin = 0; begin < count; begin += ParameterPiece<Real>::kNumbers) {
    const int numbers = static_cast<int>(std::min(int64_t{ParameterPiece<Real>::kNumbers}, count - begin));
    std::transform(from + begin, from + begin + numbers, piece.number, [](Given x) { return static_cast<Real>(x); });
    launch(status, unpack_kernel<Real>, static_cast<unsigned>(ceil_div(numbers, kDensityThreads)), kDensityThreads, 0,
           stream, piece, numbers, to + begin);
  }
}

}  // namespace

template <class Real>
void density_matrices(Status& status, const QuantumNoiseParams& p, const QuantumNoiseTensors& t, const CudaCall& call) {
  DensityMatrices<Real> m;
  m.lay_out(p, call.scratch);
  NoiseJob<Real> last = noise_job<Real>(p, t);
  last.source = m.found, last.source_type = p.type == DType::f64 ? DType::f64 : DType::f32;
  last.width = int64_t{1} << p.qubits;
  last.tolerance = kInfinity;  // rows that were none are NaN
  const int64_t bytes = p.type == DType::f64 ? 8 : p.type == DType::f32 ? 4 : 2;
  const int64_t numbers = int64_t{2} << 2 * p.qubits;
  if (p.unitary_type == DType::f64) {
    send(status, static_cast<const double*>(p.unitary), numbers, m.unitary, call.stream);
  } else {
    send(status, static_cast<const float*>(p.unitary), numbers, m.unitary, call.stream);
  }
  for (int64_t first = 0; first < p.rows; first += m.rows) {
    m.rows = std::min(m.rows, p.rows - first);
    const char* rows = static_cast<const char*>(t.probabilities) + first * p.n * bytes;
    if constexpr (sizeof(Real) == 8) {
      find_amplitudes<double>(status, p, rows, m, call.stream);
    } else if (p.type == DType::f32) {
      find_amplitudes<float>(status, p, rows, m, call.stream);
    } else if (p.type == DType::f16) {
      find_amplitudes<__half>(status, p, rows, m, call.stream);
    } else {
      find_amplitudes<__nv_bfloat16>(status, p, rows, m, call.stream);
    }
    int qubit = p.qubits % 2;
    if (qubit) map_qubits<Real, 1>(status, p, 0, m, call.stream);
    for (; qubit < p.qubits; qubit += 2) map_qubits<Real, 2>(status, p, qubit, m, call.stream);
    find_forms(status, p, m, call.stream);
    last.rows = m.rows;
    last.noisy = static_cast<char*>(t.noisy) + first * p.n * bytes;
    last.leak = t.leak ? static_cast<Real*>(t.leak) + first : nullptr;
    closed_form(status, last, call.stream);
  }
}

template <class Real>
size_t density_scratch_bytes(const QuantumNoiseParams& p) {
  DensityMatrices<Real> m;
  return static_cast<size_t>(m.lay_out(p, nullptr)) * sizeof(Real);
}

template void density_matrices<float>(Status& status, const QuantumNoiseParams& p, const QuantumNoiseTensors& t,
                                      const CudaCall& call);
template void density_matrices<double>(Status& status, const QuantumNoiseParams& p, const QuantumNoiseTensors& t,
                                       const CudaCall& call);
template size_t density_scratch_bytes<float>(const QuantumNoiseParams& p);
template size_t density_scratch_bytes<double>(const QuantumNoiseParams& p);

}  // namespace cuda
}  // namespace qexport
