// How ops call the kernels of the CUDA plugin.
#pragma once

#include "ort_api.h"
#include "qexport/cuda_plugin.h"

namespace qexport {

// Queues a kernel on the stream of this run. `seed` is in device memory, or null.
template <class Params, class Tensors>
void ort_cuda(OrtKernelContext* context, const char* op_name,
              const char* (*kernel)(const Params&, const Tensors&, const CudaCall&), size_t scratch_bytes,
              const Params& params, const Tensors& tensors, const int64_t* seed = nullptr) {
  const OrtScratch scratch(context, Device::cuda, scratch_bytes);
  void* stream = nullptr;
  ort_check(ort->KernelContext_GetGPUComputeStream(context, &stream));
  if (const char* error = kernel(params, tensors, {seed, scratch.data(), stream})) {
    throw std::runtime_error("[" + std::string(op_name) + "] CUDA: " + error);
  }
}

}  // namespace qexport
