#include "mps_attention.h"

#include "mps_attributes.h"
#include "ort_op.h"
#include "qexport/quantum_attention.h"
#include "shape_inference.h"

namespace qexport {
namespace {

struct Kernel {
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
    const ParallelFor parallel = ort_parallel(context);
    const OrtScratch scratch(context, mps_attention_cpu_scratch_bytes(call.params, parallel));
    mps_attention_cpu(call.params, {cores.data, V.data, ort_output(context, 0, call.Y)}, scratch.data(), parallel);
  }
};

}  // namespace

const OrtCustomOp* mps_attention_op(DType type, bool shape_inference) {
  return op_for<Kernel, infer_mps_attention_shapes>(type, shape_inference);
}

}  // namespace qexport
