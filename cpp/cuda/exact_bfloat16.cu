#include "exact_kernel.cuh"

namespace qexport {
namespace cuda {

template void start_exact<__nv_bfloat16>(Status&, const ExactLaunch&, const Device&, void*, void*);

}  // namespace cuda
}  // namespace qexport
