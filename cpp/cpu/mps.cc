// The MPS ops: the copy of the kernels for this processor does the work.
#include "kernels.h"

namespace qexport {

MpsStatus mps_encode_cpu(const MpsEncodeParams& params, const MpsEncodeTensors& tensors, const ParallelFor& parallel) {
  return kernels().mps->encode(params, tensors, parallel);
}

MpsStatus mps_decode_cpu(const MpsDecodeParams& params, const MpsDecodeTensors& tensors, const ParallelFor& parallel) {
  return kernels().mps->decode(params, tensors, parallel);
}

}  // namespace qexport
