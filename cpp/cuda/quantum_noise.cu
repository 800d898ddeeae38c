// QuantumNoise on CUDA: a block holds rows side by side in shared memory, and a thread takes 16 numbers of them at a time,
// those whose places differ in four bits (8 of wide or complex ones): as many qubits for one reading and writing. A row that
// is too long for that lies in scratch, one for each block. With a unitary of all qubits each row has a density matrix:
// quantum_noise_density.cu.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "quantum_noise_rows.cuh"

namespace qexport {
namespace cuda {
namespace {

constexpr int kThreads = 256, kMostThreads = 512;
constexpr int kMostRows = kThreads;  // of a block: each has a thread at least
constexpr int kBlockBits = 12;       // a block has 2^12 numbers, or more where a row has
constexpr int kManyBits = 16;        // of which a block holds less in shared memory, whatever the device
constexpr int64_t kMostBlocks = int64_t{1} << 20;

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
  using InShared = NoiseRows<Real, true, kTwisted>;
  int row_bits = 0;
  while (row_bits + job.qubits < kBlockBits && 2 << row_bits <= kMostRows) ++row_bits;
  const Device device = current_device(status);
  const int64_t blocks = ceil_div(job.rows, int64_t{1} << row_bits);
  if (row_bits + job.qubits < kManyBits &&
      static_cast<size_t>(InShared::bytes(row_bits + job.qubits)) <= most_shared_bytes(device)) {
    return visit(InShared{}, row_bits, std::min(blocks, kMostBlocks));
  }
  visit(NoiseRows<Real, false, kTwisted>{}, row_bits, std::min<int64_t>(blocks, device.multiprocessors));
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
