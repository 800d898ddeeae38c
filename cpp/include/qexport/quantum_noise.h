// QuantumNoise: a noise channel on the qubits that hold rows of probabilities, and their measurement: docs/noise.md.
// Plain pointers and sizes; knows no framework, allocates nothing.
#pragma once

#include <cstddef>

#include "qexport/dtype.h"
#include "qexport/parallel.h"

namespace qexport {

struct QuantumNoiseParams {
  DType type;       // of the rows: f32, f16, bf16 or f64
  int64_t rows, n;  // n >= 2
  int qubits;       // ceil(log2 n)
  // In closed form each qubit is measured along a direction of its own. (qubits, 2): cosine and sine of half its angle to
  // the Z axis; null: along Z.
  const double* directions;
  const double* azimuths;  // (qubits,): its angle in the plane of X and Y; null: 0
  // (qubits, 2): probability that the qubit is measured as 1 where it would be 0, and as 0 where it would be 1; or null.
  // Inverses of noise have such numbers too, which may be below 0 or above 1, and so may `uniform`.
  const double* transitions;
  double uniform;  // share of a row that is spread over all 2^qubits states
  bool renormalize;
  // With a unitary of all qubits, what is above up to `transitions` is null, and maps of a density matrix, (qubits, 4, 4)
  // complex, stand for the channel in front of it; else null. With real_maps their imaginary parts are 0.
  const double* maps;
  bool real_maps;
  const void* unitary;  // (2^qubits, 2^qubits, 2), real and imaginary parts
  DType unitary_type;   // f32 or f64
};

// Qubits whose density matrix a thread is trusted to hold: 268 MB of double.
constexpr int kMaxDensityQubits = 12;

struct QuantumNoiseTensors {
  // Input
  const void* probabilities;  // (rows, n)
  // Outputs
  void* noisy;  // (rows, n)
  void* leak;   // (rows,), double if the rows are, else float; may be null
};

size_t quantum_noise_cpu_scratch_bytes(const QuantumNoiseParams& params, const ParallelFor& parallel);

// Returns -1, or the first row that does not hold probabilities; the outputs then mean nothing.
int64_t quantum_noise_cpu(const QuantumNoiseParams& params, const QuantumNoiseTensors& tensors, void* scratch,
                          const ParallelFor& parallel);

}  // namespace qexport
