// The CUDA kernels as a table of functions: all that libqexport_ops_cuda.so exports, so that nothing that loads it needs
// CUDA to be built or to run. Pointers in tensors are those of device memory, if not said otherwise.
#pragma once

#include "qexport/mpo_linear.h"
#include "qexport/mps_attention.h"
#include "qexport/mps_decode.h"
#include "qexport/quantum_attention.h"
#include "qexport/quantum_measure.h"
#include "qexport/quantum_noise.h"

namespace qexport {

// What every call takes beside its tensors. Work is queued on the stream and nothing waits for it, so a call may be captured
// in a graph; params that point to host memory are read before the call returns.
struct CudaCall {
  const int64_t* seed;  // in device memory, which a replayed graph reads again; null: 0. `params.seed` is not used
  void* scratch;        // of as many bytes as the function beside it says, aligned to 256; free to be reused behind the call
  void* stream;         // a cudaStream_t
};

// Changes with the sizes of what goes through the table, so that a plugin of another release is refused and not called.
template <class... T>
constexpr uint64_t layout_of(uint64_t sum = 1) {
  ((sum = sum * 1099511628211u + sizeof(T)), ...);
  return sum;
}
constexpr uint64_t kCudaLayout =
    layout_of<QuantumAttentionParams, QuantumAttentionTensors, QuantumNoiseParams, QuantumNoiseTensors, QuantumMeasureParams,
              QuantumMeasureTensors, MpsDecodeParams, MpsDecodeTensors, MpsAttentionParams, MpsAttentionTensors,
              MpoLinearParams, MpoLinearTensors, CudaCall>();

// Functions return null, or what went wrong as one line that lives for ever, without the name of the op. Rows that are no
// probabilities cannot be reported without waiting; they become NaN.
struct CudaKernels {
  uint64_t layout;  // kCudaLayout of the release that it was built from
  size_t (*quantum_attention_scratch_bytes)(const QuantumAttentionParams&, const QuantumAttentionTensors&);
  const char* (*quantum_attention)(const QuantumAttentionParams&, const QuantumAttentionTensors&, const CudaCall&);
  size_t (*quantum_noise_scratch_bytes)(const QuantumNoiseParams&);
  const char* (*quantum_noise)(const QuantumNoiseParams&, const QuantumNoiseTensors&, const CudaCall&);
  size_t (*quantum_measure_scratch_bytes)(const QuantumMeasureParams&);
  const char* (*quantum_measure)(const QuantumMeasureParams&, const QuantumMeasureTensors&, const CudaCall&);
  size_t (*mps_decode_scratch_bytes)(const MpsDecodeParams&);
  const char* (*mps_decode)(const MpsDecodeParams&, const MpsDecodeTensors&, const CudaCall&);
  size_t (*mps_attention_scratch_bytes)(const MpsAttentionParams&);
  const char* (*mps_attention)(const MpsAttentionParams&, const MpsAttentionTensors&, const CudaCall&);
  size_t (*mpo_linear_scratch_bytes)(const MpoLinearParams&);
  // Here `weights` are the cores as they are.
  const char* (*mpo_linear)(const MpoLinearParams&, const MpoLinearTensors&, const CudaCall&);
};

}  // namespace qexport

extern "C" const qexport::CudaKernels* qexport_cuda_kernels();
