// MPSDecode: trains to matrices: docs/mps.md.
#pragma once

#include "qexport/mps.h"

namespace qexport {

struct MpsDecodeParams {
  DType type;  // f32 or f64
  int64_t batch;
  MpsLayout layout;
};

struct MpsDecodeTensors {
  // Input
  const void* cores;  // (batch, numbers)
  // Output
  void* matrix;  // (batch, rows, cols)
};

// Allocates the products of the first sites; throws nothing.
MpsStatus mps_decode_cpu(const MpsDecodeParams& params, const MpsDecodeTensors& tensors, const ParallelFor& parallel);

}  // namespace qexport
