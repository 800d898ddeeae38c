// The part of MPSDecode and of the products with trains that is compiled once per instruction set.
#pragma once

#include "qexport/mpo_linear.h"
#include "qexport/mps_attention.h"
#include "qexport/mps_decode.h"

namespace qexport {

struct MpsProductKernels {
  size_t (*decode_scratch_bytes)(const MpsDecodeParams&, const ParallelFor&);
  void (*decode)(const MpsDecodeParams&, const MpsDecodeTensors&, void*, const ParallelFor&);
  size_t (*attention_scratch_bytes)(const MpsAttentionParams&, const ParallelFor&);
  void (*attention)(const MpsAttentionParams&, const MpsAttentionTensors&, void*, const ParallelFor&);
  size_t (*weight_bytes)(const MpoLinearParams&);
  size_t (*prepare_scratch_bytes)(const MpoLinearParams&);
  void (*prepare)(const MpoLinearParams&, const void*, void*, void*, const ParallelFor&);
  size_t (*linear_scratch_bytes)(const MpoLinearParams&, const ParallelFor&);
  void (*linear)(const MpoLinearParams&, const MpoLinearTensors&, void*, const ParallelFor&);
};

}  // namespace qexport
