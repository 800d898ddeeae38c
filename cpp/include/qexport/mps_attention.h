// MPSAttention: a train of cores times values: docs/mps.md.
#pragma once

#include "qexport/mps_product.h"

namespace qexport {

struct MpsAttentionParams {
  DType type;  // of all tensors: f32, f16, bf16 or f64
  MpsLayout layout;
  MpsGroups groups;
  int64_t trains, items;  // each train meets `items` matrices of values
  int64_t features;
};

struct MpsAttentionTensors {
  // Inputs
  const void* cores;  // (trains, numbers)
  const void* V;      // (trains, items, cols, features)
  // Output
  void* Y;  // (trains, items, rows, features)
};

size_t mps_attention_cpu_scratch_bytes(const MpsAttentionParams& params, const ParallelFor& parallel);

void mps_attention_cpu(const MpsAttentionParams& params, const MpsAttentionTensors& tensors, void* scratch,
                       const ParallelFor& parallel);

}  // namespace qexport
