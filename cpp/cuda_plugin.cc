#include "qexport/cuda_plugin.h"

#include <dlfcn.h>

namespace qexport {

CudaPlugin load_cuda_plugin(const std::string& path) {
  using Entry = const CudaKernels* (*)();
  // Its symbols stay its own: another copy of CUDA's runtime may be in the process.
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  const auto entry = library ? reinterpret_cast<Entry>(dlsym(library, "qexport_cuda_kernels")) : nullptr;
  if (entry && entry()->layout == kCudaLayout) return {entry(), {}};
  if (entry) return {nullptr, path + " belongs to another release of qexport; install both libraries from one"};
  const char* const error = dlerror();
  const std::string reason = error ? error : path + " holds no CUDA kernels";
  return {nullptr, reason.substr(0, reason.find('\n'))};
}

const CudaPlugin& cuda_plugin() {
  static const CudaPlugin plugin = [] {
    Dl_info info{};
    const void* const here = reinterpret_cast<const void*>(&cuda_plugin);
    const std::string self = dladdr(here, &info) && info.dli_fname ? info.dli_fname : "";
    return load_cuda_plugin(self.substr(0, self.rfind('/') + 1) + "libqexport_ops_cuda.so");
  }();
  return plugin;
}

}  // namespace qexport
