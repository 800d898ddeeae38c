#include "quantum_noise.h"

#include "ort_channel.h"
#include "ort_op.h"
#include "qexport/quantum_noise_check.h"
#include "shape_inference.h"

namespace qexport {
namespace {

struct Kernel {
  static constexpr const char* kName = "QuantumNoise";
  static constexpr size_t kInputCount = 7, kOutputCount = 2, kRequiredInputs = 2, kRequiredOutputs = 1;
  // Parameters and the leak are double where the rows are, else float.
  static OrtElementType parameter_type(OrtElementType type) {
    return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE ? type : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  static OrtElementType input_type(OrtElementType type, size_t i) { return i == 0 ? type : parameter_type(type); }
  static OrtElementType output_type(OrtElementType type, size_t i) { return i == 0 ? type : parameter_type(type); }

  QuantumNoiseAttributes attributes;

  explicit Kernel(const OrtKernelInfo* info) {
    const NodeAttributes node(info, kName);
    attributes = {{node.text("channel"), node.text("scope"), node.text("convention")},
                  node.text("basis"),
                  node.integer("inverse"),
                  node.integer("renormalize")};
    check_attributes(attributes);
  }

  void compute(OrtKernelContext* context) const {
    const QuantumNoiseInputs in{ort_input(context, 0, kName, "probabilities"), ort_channel(context, 1, kName),
                                ort_input(context, 6, kName, "unitary")};
    const QuantumNoiseCall call = resolve_call(attributes, in);
    void* noisy = ort_output(context, 0, call.noisy);
    const QuantumNoiseTensors tensors{in.probabilities.data, noisy, ort_output(context, 1, call.leak)};
    const ParallelFor parallel = ort_parallel(context);
    const OrtScratch scratch(context, quantum_noise_cpu_scratch_bytes(call.params, parallel));
    const int64_t bad_row = quantum_noise_cpu(call.params, tensors, scratch.data(), parallel);
    if (bad_row >= 0) fail_row(kName, call.rows, bad_row);
  }
};

}  // namespace

const OrtCustomOp* quantum_noise_op(DType type, bool shape_inference) {
  return op_for<Kernel, infer_row_shapes>(type, shape_inference);
}

}  // namespace qexport
