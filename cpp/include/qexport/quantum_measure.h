// QuantumMeasure: how often each outcome is found in `shots` measurements of rows of probabilities: docs/noise.md.
// Plain pointers and sizes; knows no framework, allocates nothing.
#pragma once

#include <cstddef>

#include "qexport/dtype.h"
#include "qexport/parallel.h"

namespace qexport {

struct QuantumMeasureParams {
  DType type;       // of the rows: f32, f16, bf16 or f64
  int64_t rows, n;  // n >= 1
  int64_t queries;  // row r draws as query r % queries of row number r / queries
  int64_t shots;    // >= 1
  uint32_t layer;
  int64_t seed;
};

struct QuantumMeasureTensors {
  // Input
  const void* probabilities;  // (rows, n)
  // Output
  void* frequencies;  // (rows, n)
};

size_t quantum_measure_cpu_scratch_bytes(const QuantumMeasureParams& params, const ParallelFor& parallel);

// Returns -1, or the first row that does not hold probabilities; the output then means nothing.
int64_t quantum_measure_cpu(const QuantumMeasureParams& params, const QuantumMeasureTensors& tensors, void* scratch,
                            const ParallelFor& parallel);

}  // namespace qexport
