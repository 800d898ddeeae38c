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

size_t mps_decode_cpu_scratch_bytes(const MpsDecodeParams& params, const ParallelFor& parallel);

void mps_decode_cpu(const MpsDecodeParams& params, const MpsDecodeTensors& tensors, void* scratch,
                    const ParallelFor& parallel);

}  // namespace qexport
