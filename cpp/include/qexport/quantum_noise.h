// QuantumNoise: a noise channel on the qubits that hold rows of probabilities, in closed form: docs/noise.md.
// Plain pointers and sizes; knows no framework, allocates nothing.
#pragma once

#include <cstddef>

#include "qexport/dtype.h"
#include "qexport/parallel.h"

namespace qexport {

struct QuantumNoiseParams {
  DType type;       // of the rows: f32, f16, bf16 or f64
  int64_t rows, n;  // n >= 1; one state needs no qubit, so no noise reaches it
  int qubits;       // ceil(log2 n)
  bool hadamard;    // basis x: a Hadamard gate on every qubit first
  // (qubits, 2): probability that the qubit is measured as 1 where it would be 0, and as 0 where it would be 1; or null.
  // Inverses of noise have such numbers too, which may be below 0 or above 1, and so may `uniform`.
  const double* transitions;
  double uniform;  // share of a row that is spread over all 2^qubits states
  bool renormalize;
};

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
