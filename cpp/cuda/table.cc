#include "kernels.h"

extern "C" __attribute__((visibility("default"))) const qexport::CudaKernels* qexport_cuda_kernels() {
  using namespace qexport::cuda;
  static const qexport::CudaKernels kernels{qexport::kCudaLayout,
                                            quantum_attention_scratch_bytes,
                                            quantum_attention,
                                            quantum_noise_scratch_bytes,
                                            quantum_noise,
                                            quantum_measure_scratch_bytes,
                                            quantum_measure,
                                            mps_decode_scratch_bytes,
                                            mps_decode,
                                            mps_attention_scratch_bytes,
                                            mps_attention,
                                            mpo_linear_scratch_bytes,
                                            mpo_linear};
  return &kernels;
}
