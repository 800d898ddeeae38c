// MPSDecode on the device: the matrix is the core of all sites merged.
#include "kernels.h"
#include "train.cuh"

namespace qexport {
namespace cuda {
namespace {

void decode(TrainRun& run, const MpsDecodeParams& p, const MpsDecodeTensors& t) {
  if (p.batch > 0) CoreMaker(run, p.layout, p.type, p.batch, t.cores).decode(t.matrix);
}

}  // namespace

size_t mps_decode_scratch_bytes(const MpsDecodeParams& params) {
  TrainRun run(params.type, nullptr);
  decode(run, params, {});
  return run.most();
}

const char* mps_decode(const MpsDecodeParams& params, const MpsDecodeTensors& tensors, const CudaCall& call) {
  TrainRun run(params.type, &call);
  decode(run, params, tensors);
  return run.status.text;
}

}  // namespace cuda
}  // namespace qexport
