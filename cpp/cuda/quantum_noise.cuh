// One call of QuantumNoise as its CUDA kernels see it.
#pragma once

#include "probability_rows.cuh"

namespace qexport {
namespace cuda {

// Rows of 2^40 numbers fit no device; what is known of so many qubits fits the parameters of a kernel, 4 KB.
constexpr int kMaxQubits = 40;

template <class Real>
struct QubitNoise {
  Real cosine, sine;              // of half the angle of its direction to the Z axis
  Real phase_re, phase_im;        // exp(-i azimuth)
  Real stay0, fall, rise, stay1;  // p(0) <- stay0 p(0) + fall p(1), p(1) <- rise p(0) + stay1 p(1)
};

// What happens to rows in closed form, from one buffer to another. Passed to kernels by value.
template <class Real>
struct NoiseJob {
  const void* source;  // (rows, width), NaN in the output where a row has another sum than one or zero
  DType source_type;
  int64_t rows, width;
  double tolerance;  // of the sum
  void* noisy;       // (rows, n)
  DType type;
  int64_t n;
  Real* leak;     // (rows,), or null
  Real* scratch;  // of the blocks, where rows do not fit shared memory
  int qubits;
  bool turned, twisted, flipped;  // whether qubits have directions, azimuths, transitions
  bool renormalize;
  Real kept, share;  // p <- kept p + share sum(p)
  QubitNoise<Real> qubit[kMaxQubits];
};

// What is behind directions and transitions, for rows of a call.
template <class Real>
NoiseJob<Real> noise_job(const QuantumNoiseParams& p, const QuantumNoiseTensors& t);

// Rows of the job; scratch of as many bytes as the function below says. quantum_noise.cu.
template <class Real>
void closed_form(Status& status, const NoiseJob<Real>& job, void* stream);
template <class Real>
size_t closed_form_scratch_bytes(Status& status, const NoiseJob<Real>& job);

// Rows that have density matrices, since a unitary of all qubits is behind their channel. quantum_noise_density.cu.
template <class Real>
void density_matrices(Status& status, const QuantumNoiseParams& p, const QuantumNoiseTensors& t, const CudaCall& call);
template <class Real>
size_t density_scratch_bytes(const QuantumNoiseParams& p);

}  // namespace cuda
}  // namespace qexport
