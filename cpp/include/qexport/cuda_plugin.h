// Loads libqexport_ops_cuda.so, which holds the CUDA kernels, where there is one. Needs no CUDA itself.
#pragma once

#include <string>

#include "qexport/cuda_kernels.h"

namespace qexport {

struct CudaPlugin {
  const CudaKernels* kernels;  // null: there are none
  std::string reason;          // why there are none, in one line
};

// The plugin at `path`, which stays loaded as long as the process runs.
CudaPlugin load_cuda_plugin(const std::string& path);

// The plugin beside the shared library that this function is part of. Loaded by the first call.
const CudaPlugin& cuda_plugin();

}  // namespace qexport
