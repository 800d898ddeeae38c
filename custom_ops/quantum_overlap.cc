#include "quantum_overlap.h"

#include "ort_channel.h"
#include "ort_op.h"
#include "qexport/quantum_attention.h"
#include "qexport/quantum_overlap_check.h"
#include "shape_inference.h"

namespace qexport {
namespace {

struct Kernel : OpOn<Device::cpu> {
  static constexpr const char* kName = "QuantumOverlap";
  static constexpr size_t kInputCount = 7, kOutputCount = 1, kRequiredInputs = 3, kRequiredOutputs = 1;
  static OrtElementType input_type(OrtElementType type, size_t i) {
    return i < 2 || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE ? type : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  static OrtElementType output_type(OrtElementType type, size_t) { return type; }

  NoiseChannelAttributes attributes;

  explicit Kernel(const OrtKernelInfo* info) {
    if (const char* error = isa_error()) throw std::invalid_argument(error);
    const NodeAttributes node(info, kName);
    attributes = {node.text("channel"), node.text("scope"), node.text("convention")};
    check_attributes(kName, attributes, false);
  }

  void compute(OrtKernelContext* context) const {
    const QuantumOverlapInputs in{ort_input(context, 0, kName, "queries"), ort_input(context, 1, kName, "keys"),
                                  ort_channel(context, 2, kName)};
    const QuantumOverlapCall call = resolve_overlap(attributes, in);
    const QuantumOverlapTensors tensors{in.queries.data, in.keys.data, ort_output(context, 0, call.overlaps)};
    const ParallelFor parallel = ort_parallel(context);
    const OrtScratch scratch(context, Device::cpu, quantum_overlap_cpu_scratch_bytes(call.params, parallel));
    quantum_overlap_cpu(call.params, tensors, scratch.data(), parallel);
  }
};

}  // namespace

const OrtCustomOp* quantum_overlap_op(DType type, bool shape_inference) {
  return op_for<Kernel, infer_overlap_shapes>(type, shape_inference);
}

}  // namespace qexport
