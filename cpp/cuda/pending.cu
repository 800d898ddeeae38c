// Stands in for kernels that are not written yet: what is defined in the file of its name goes before it.
#include "attention.cuh"
#include "kernels.h"

#define QEXPORT_PENDING __attribute__((weak))

namespace qexport {
namespace cuda {
namespace {
constexpr const char* kPending = "there is no CUDA kernel of this op yet";
}

QEXPORT_PENDING void exact_attention(Status& status, const AttentionJob&, const int32_t*, void*, void*) {
  status.fail("there is no CUDA kernel of exact attention yet");
}
QEXPORT_PENDING size_t exact_attention_scratch_bytes(const AttentionJob&) { return 0; }
QEXPORT_PENDING void row_attention(Status& status, const AttentionJob&, const HeadSamples&, void*, void*) {
  status.fail("there is no CUDA kernel of naive, stratified, adaptive and hybrid yet");
}
QEXPORT_PENDING size_t row_attention_scratch_bytes(const AttentionJob&) { return 0; }
QEXPORT_PENDING bool tree_applies(const AttentionJob&, const int64_t*, int64_t) { return true; }
QEXPORT_PENDING void tree_attention(Status& status, const AttentionJob&, const HeadSamples&, void*, void*) {
  status.fail("there is no CUDA kernel of tree yet");
}
QEXPORT_PENDING size_t tree_attention_scratch_bytes(const AttentionJob&) { return 0; }

QEXPORT_PENDING size_t quantum_attention_scratch_bytes(const QuantumAttentionParams&, const QuantumAttentionTensors&) {
  return 0;
}
QEXPORT_PENDING const char* quantum_attention(const QuantumAttentionParams&, const QuantumAttentionTensors&,
                                              const CudaCall&) {
  return kPending;
}
QEXPORT_PENDING size_t quantum_noise_scratch_bytes(const QuantumNoiseParams&) { return 0; }
QEXPORT_PENDING const char* quantum_noise(const QuantumNoiseParams&, const QuantumNoiseTensors&, const CudaCall&) {
  return kPending;
}
QEXPORT_PENDING size_t quantum_measure_scratch_bytes(const QuantumMeasureParams&) { return 0; }
QEXPORT_PENDING const char* quantum_measure(const QuantumMeasureParams&, const QuantumMeasureTensors&, const CudaCall&) {
  return kPending;
}
QEXPORT_PENDING size_t mps_decode_scratch_bytes(const MpsDecodeParams&) { return 0; }
QEXPORT_PENDING const char* mps_decode(const MpsDecodeParams&, const MpsDecodeTensors&, const CudaCall&) { return kPending; }
QEXPORT_PENDING size_t mps_attention_scratch_bytes(const MpsAttentionParams&) { return 0; }
QEXPORT_PENDING const char* mps_attention(const MpsAttentionParams&, const MpsAttentionTensors&, const CudaCall&) {
  return kPending;
}
QEXPORT_PENDING size_t mpo_linear_scratch_bytes(const MpoLinearParams&) { return 0; }
QEXPORT_PENDING const char* mpo_linear(const MpoLinearParams&, const MpoLinearTensors&, const CudaCall&) { return kPending; }

}  // namespace cuda
}  // namespace qexport
