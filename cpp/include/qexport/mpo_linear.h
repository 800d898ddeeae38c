// MPOLinear: rows times a weight that is a train of cores: docs/mps.md.
#pragma once

#include "qexport/mps_product.h"

namespace qexport {

struct MpoLinearParams {
  DType type;        // of all tensors: f32, f16, bf16 or f64
  MpsLayout layout;  // of the weight: rows are inputs, columns outputs
  MpsGroups groups;
  int64_t tokens;
};

struct MpoLinearTensors {
  // Inputs
  const void* x;        // (tokens, rows)
  const void* weights;  // what mpo_linear_cpu_prepare made of the cores
  const void* bias;     // (cols,), or null
  // Output
  void* y;  // (tokens, cols)
};

// The groups of a train in the form that products read, of mpo_linear_cpu_weight_bytes, aligned to 64; `tokens` is of no
// matter.
size_t mpo_linear_cpu_weight_bytes(const MpoLinearParams& params);
size_t mpo_linear_cpu_prepare_scratch_bytes(const MpoLinearParams& params);
void mpo_linear_cpu_prepare(const MpoLinearParams& params, const void* cores, void* weights, void* scratch,
                            const ParallelFor& parallel);

size_t mpo_linear_cpu_scratch_bytes(const MpoLinearParams& params, const ParallelFor& parallel);

void mpo_linear_cpu(const MpoLinearParams& params, const MpoLinearTensors& tensors, void* scratch,
                    const ParallelFor& parallel);

}  // namespace qexport
