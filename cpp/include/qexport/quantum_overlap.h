// QuantumOverlap: the probability of finding a key's state in a query's state that met a noise channel: docs/noise.md.
// Plain pointers and sizes; knows no framework, allocates nothing.
#pragma once

#include <cstddef>

#include "qexport/dtype.h"
#include "qexport/parallel.h"

namespace qexport {

struct QuantumOverlapParams {
  DType type;  // of all tensors: f32, f16, bf16 or f64
  int64_t batch, queries, keys, size;
  int qubits;  // ceil(log2 size), at least 1
  // A channel that keeps diagonals: (qubits,) factors of each qubit's coherences. Null: maps of density matrices,
  // (qubits, 4, 4) complex; with real_maps their imaginary parts are 0.
  const double* coherences;
  const double* maps;
  bool real_maps;
  double uniform;  // share of the query's state that becomes the mixed state
};

struct QuantumOverlapTensors {
  // Inputs
  const void* queries;  // (batch, queries, size)
  const void* keys;     // (batch, keys, size)
  // Output
  void* overlaps;  // (batch, queries, keys)
};

size_t quantum_overlap_cpu_scratch_bytes(const QuantumOverlapParams& params, const ParallelFor& parallel);

void quantum_overlap_cpu(const QuantumOverlapParams& params, const QuantumOverlapTensors& tensors, void* scratch,
                         const ParallelFor& parallel);

}  // namespace qexport
