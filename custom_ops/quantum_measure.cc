#include "quantum_measure.h"

#include "ort_op.h"
#include "qexport/quantum_noise_check.h"
#include "shape_inference.h"

namespace qexport {
namespace {

struct Kernel {
  static constexpr const char* kName = "QuantumMeasure";
  static constexpr size_t kInputCount = 2, kOutputCount = 1, kRequiredInputs = 1, kRequiredOutputs = 1;
  static OrtElementType input_type(OrtElementType type, size_t i) {
    return i == 0 ? type : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
  }
  static OrtElementType output_type(OrtElementType type, size_t) { return type; }

  QuantumMeasureAttributes attributes;

  explicit Kernel(const OrtKernelInfo* info) {
    const NodeAttributes node(info, kName);
    attributes = {node.integer("shots"), node.integer("layer")};
    check_attributes(attributes);
  }

  void compute(OrtKernelContext* context) const {
    const TensorView probabilities = ort_input(context, 0, kName, "probabilities");
    const int64_t seed = ort_seed(ort_input(context, 1, kName, "seed"), kName);
    const QuantumMeasureCall call = resolve_call(attributes, probabilities, seed);
    const QuantumMeasureTensors tensors{probabilities.data, ort_output(context, 0, call.frequencies)};
    const ParallelFor parallel = ort_parallel(context);
    const OrtScratch scratch(context, quantum_measure_cpu_scratch_bytes(call.params, parallel));
    const int64_t bad_row = quantum_measure_cpu(call.params, tensors, scratch.data(), parallel);
    if (bad_row >= 0) fail_row(kName, call.rows, bad_row);
  }
};

}  // namespace

const OrtCustomOp* quantum_measure_op(DType type, bool shape_inference) {
  return op_for<Kernel, infer_row_shapes>(type, shape_inference);
}

}  // namespace qexport
