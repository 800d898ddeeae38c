// MPSEncode: matrices to trains by sequential decompositions (TT-SVD): docs/mps.md.
#pragma once

#include "qexport/mps.h"

namespace qexport {

struct MpsEncodeParams {
  DType type;  // f32 or f64
  int64_t batch;
  MpsLayout layout;  // its bonds are the upper limits
  double tol;        // 0: as much as the bonds allow
};

struct MpsEncodeTensors {
  // Input
  const void* matrix;  // (batch, rows, cols)
  // Outputs
  void* cores;          // (batch, numbers)
  int64_t* ranks;       // (batch, sites + 1)
  double* error;        // (batch,)
  double* lower_bound;  // (batch,)
};

// Unlike the other kernels it allocates: its eigenvalue solver (Eigen) does. Throws nothing.
MpsStatus mps_encode_cpu(const MpsEncodeParams& params, const MpsEncodeTensors& tensors, const ParallelFor& parallel);

}  // namespace qexport
