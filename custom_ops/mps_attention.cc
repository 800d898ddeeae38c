#include "mps_attention.h"

#include "mps_attributes.h"
#include "ort_cuda.h"
#include "ort_op.h"
#include "qexport/quantum_attention.h"
#include "shape_inference.h"

namespace qexport {
namespace {

template <Device kDevice>
struct Kernel : OpOn<kDevice> {
  static constexpr const char* kName = "MPSAttention";
  static constexpr size_t kInputCount = 2, kOutputCount = 1, kRequiredInputs = 2, kRequiredOutputs = 1;
  static OrtElementType input_type(OrtElementType type, size_t) { return type; }
  static OrtElementType output_type(OrtElementType type, size_t) { return type; }

  MpsProductAttributes attributes;

  explicit Kernel(const OrtKernelInfo* info) : attributes(product_attributes(info, kName)) {
    if (const char* error = isa_error()) throw std::invalid_argument(error);
  }

  void compute(OrtKernelContext* context) const {
    const TensorView cores = ort_input(context, 0, kName, "cores"), V = ort_input(context, 1, kName, "V");
    const MpsAttentionCall call = resolve_attention(attributes, cores, V);
    const MpsAttentionTensors tensors{cores.data, V.data, ort_output(context, 0, call.Y)};
    if constexpr (kDevice == Device::cuda) {
      const CudaKernels& cuda = *cuda_plugin().kernels;
      ort_cuda(context, kName, cuda.mps_attention, cuda.mps_attention_scratch_bytes(call.params), call.params, tensors);
    } else {
      const ParallelFor parallel = ort_parallel(context);
      const OrtScratch scratch(context, Device::cpu, mps_attention_cpu_scratch_bytes(call.params, parallel));
      mps_attention_cpu(call.params, tensors, scratch.data(), parallel);
    }
  }
};

}  // namespace

const OrtCustomOp* mps_attention_op(DType type, Device device, bool shape_inference) {
  return op_for<Kernel, infer_mps_attention_shapes>(type, device, shape_inference);
}

}  // namespace qexport
