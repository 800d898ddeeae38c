// The functions behind the table of cuda_kernels.h, each defined in the .cu file of its name.
#pragma once

#include "qexport/cuda_kernels.h"

namespace qexport {
namespace cuda {

size_t quantum_attention_scratch_bytes(const QuantumAttentionParams& params, const QuantumAttentionTensors& tensors);
const char* quantum_attention(const QuantumAttentionParams& params, const QuantumAttentionTensors& tensors,
                              const CudaCall& call);
size_t quantum_noise_scratch_bytes(const QuantumNoiseParams& params);
const char* quantum_noise(const QuantumNoiseParams& params, const QuantumNoiseTensors& tensors, const CudaCall& call);
size_t quantum_measure_scratch_bytes(const QuantumMeasureParams& params);
const char* quantum_measure(const QuantumMeasureParams& params, const QuantumMeasureTensors& tensors, const CudaCall& call);
size_t mps_decode_scratch_bytes(const MpsDecodeParams& params);
const char* mps_decode(const MpsDecodeParams& params, const MpsDecodeTensors& tensors, const CudaCall& call);
size_t mps_attention_scratch_bytes(const MpsAttentionParams& params);
const char* mps_attention(const MpsAttentionParams& params, const MpsAttentionTensors& tensors, const CudaCall& call);
size_t mpo_linear_scratch_bytes(const MpoLinearParams& params);
const char* mpo_linear(const MpoLinearParams& params, const MpoLinearTensors& tensors, const CudaCall& call);

}  // namespace cuda
}  // namespace qexport
