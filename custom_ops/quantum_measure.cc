#include "quantum_measure.h"

#include "ort_cuda.h"
#include "ort_op.h"
#include "qexport/quantum_noise_check.h"
#include "shape_inference.h"

namespace qexport {
namespace {

template <Device kDevice>
struct Kernel : OpOn<kDevice> {
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
    const int64_t* seed = ort_seed(ort_input(context, 1, kName, "seed"), kName);
    const int64_t value = kDevice == Device::cpu && seed ? *seed : 0;
    const QuantumMeasureCall call = resolve_call(attributes, probabilities, value);
    const QuantumMeasureTensors tensors{probabilities.data, ort_output(context, 0, call.frequencies)};
    if constexpr (kDevice == Device::cuda) {
      const CudaKernels& cuda = *cuda_plugin().kernels;
      const size_t bytes = cuda.quantum_measure_scratch_bytes(call.params);
      ort_cuda(context, kName, cuda.quantum_measure, bytes, call.params, tensors, seed);
    } else {
      const ParallelFor parallel = ort_parallel(context);
      const OrtScratch scratch(context, Device::cpu, quantum_measure_cpu_scratch_bytes(call.params, parallel));
      const int64_t bad_row = quantum_measure_cpu(call.params, tensors, scratch.data(), parallel);
      if (bad_row >= 0) fail_row(kName, call.rows, bad_row);
    }
  }
};

}  // namespace

const OrtCustomOp* quantum_measure_op(DType type, Device device, bool shape_inference) {
  return op_for<Kernel, infer_row_shapes>(type, device, shape_inference);
}

}  // namespace qexport
