#include "mps_decode.h"

#include "mps_attributes.h"
#include "ort_cuda.h"
#include "ort_op.h"
#include "shape_inference.h"

namespace qexport {
namespace {

template <Device kDevice>
struct Kernel : OpOn<kDevice> {
  static constexpr const char* kName = "MPSDecode";
  static constexpr size_t kInputCount = 1, kOutputCount = 1, kRequiredInputs = 1, kRequiredOutputs = 1;
  static OrtElementType input_type(OrtElementType type, size_t) { return type; }
  static OrtElementType output_type(OrtElementType type, size_t) { return type; }

  MpsTrainAttributes attributes;

  explicit Kernel(const OrtKernelInfo* info) {
    const NodeAttributes node(info, kName);
    attributes = train_attributes(node);
    check_attributes(kName, attributes);
  }

  void compute(OrtKernelContext* context) const {
    const TensorView cores = ort_input(context, 0, kName, "cores");
    const MpsDecodeCall call = resolve_call(attributes, cores);
    const MpsDecodeTensors tensors{cores.data, ort_output(context, 0, call.matrix)};
    if constexpr (kDevice == Device::cuda) {
      const CudaKernels& cuda = *cuda_plugin().kernels;
      ort_cuda(context, kName, cuda.mps_decode, cuda.mps_decode_scratch_bytes(call.params), call.params, tensors);
    } else {
      const ParallelFor parallel = ort_parallel(context);
      const OrtScratch scratch(context, Device::cpu, mps_decode_cpu_scratch_bytes(call.params, parallel));
      mps_decode_cpu(call.params, tensors, scratch.data(), parallel);
    }
  }
};

}  // namespace

const OrtCustomOp* mps_decode_op(DType type, Device device, bool shape_inference) {
  return op_for<Kernel, infer_mps_decode_shapes>(type, device, shape_inference);
}

}  // namespace qexport
