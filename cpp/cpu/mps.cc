// The MPS ops: the copy of the kernels for this processor does the work.
#include "kernels.h"

namespace qexport {

MpsStatus mps_encode_cpu(const MpsEncodeParams& params, const MpsEncodeTensors& tensors, const ParallelFor& parallel) {
  return kernels().mps->encode(params, tensors, parallel);
}

size_t mps_decode_cpu_scratch_bytes(const MpsDecodeParams& params, const ParallelFor& parallel) {
  return kernels().mps_product->decode_scratch_bytes(params, parallel);
}

void mps_decode_cpu(const MpsDecodeParams& params, const MpsDecodeTensors& tensors, void* scratch,
                    const ParallelFor& parallel) {
  kernels().mps_product->decode(params, tensors, scratch, parallel);
}

size_t mps_attention_cpu_scratch_bytes(const MpsAttentionParams& params, const ParallelFor& parallel) {
  return kernels().mps_product->attention_scratch_bytes(params, parallel);
}

void mps_attention_cpu(const MpsAttentionParams& params, const MpsAttentionTensors& tensors, void* scratch,
                       const ParallelFor& parallel) {
  kernels().mps_product->attention(params, tensors, scratch, parallel);
}

size_t mpo_linear_cpu_weight_bytes(const MpoLinearParams& params) { return kernels().mps_product->weight_bytes(params); }

size_t mpo_linear_cpu_prepare_scratch_bytes(const MpoLinearParams& params) {
  return kernels().mps_product->prepare_scratch_bytes(params);
}

void mpo_linear_cpu_prepare(const MpoLinearParams& params, const void* cores, void* weights, void* scratch,
                            const ParallelFor& parallel) {
  kernels().mps_product->prepare(params, cores, weights, scratch, parallel);
}

size_t mpo_linear_cpu_scratch_bytes(const MpoLinearParams& params, const ParallelFor& parallel) {
  return kernels().mps_product->linear_scratch_bytes(params, parallel);
}

void mpo_linear_cpu(const MpoLinearParams& params, const MpoLinearTensors& tensors, void* scratch,
                    const ParallelFor& parallel) {
  kernels().mps_product->linear(params, tensors, scratch, parallel);
}

}  // namespace qexport
