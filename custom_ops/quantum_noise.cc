#include "quantum_noise.h"

#include "ort_channel.h"
#include "ort_cuda.h"
#include "ort_op.h"
#include "qexport/quantum_attention.h"
#include "qexport/quantum_noise_check.h"
#include "shape_inference.h"

namespace qexport {
namespace {

template <Device kDevice>
struct Kernel : OpOn<kDevice> {
  static constexpr const char* kName = "QuantumNoise";
  static constexpr size_t kInputCount = 7, kOutputCount = 2, kRequiredInputs = 2, kRequiredOutputs = 1;
  // Parameters and the leak are double where the rows are, else float.
  static OrtElementType parameter_type(OrtElementType type) {
    return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE ? type : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  static OrtElementType input_type(OrtElementType type, size_t i) { return i == 0 ? type : parameter_type(type); }
  static OrtElementType output_type(OrtElementType type, size_t i) { return i == 0 ? type : parameter_type(type); }
  static bool on_host(size_t i) { return i > 0; }  // the channel and the unitary, which are checked and composed there

  QuantumNoiseAttributes attributes;

  explicit Kernel(const OrtKernelInfo* info) {
    if (const char* error = isa_error()) throw std::invalid_argument(error);
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
    if constexpr (kDevice == Device::cuda) {
      const CudaKernels& cuda = *cuda_plugin().kernels;
      ort_cuda(context, kName, cuda.quantum_noise, cuda.quantum_noise_scratch_bytes(call.params), call.params, tensors);
    } else {
      const ParallelFor parallel = ort_parallel(context);
      const OrtScratch scratch(context, Device::cpu, quantum_noise_cpu_scratch_bytes(call.params, parallel));
      const int64_t bad_row = quantum_noise_cpu(call.params, tensors, scratch.data(), parallel);
      if (bad_row >= 0) fail_row(kName, call.rows, bad_row);
    }
  }
};

}  // namespace

const OrtCustomOp* quantum_noise_op(DType type, Device device, bool shape_inference) {
  return op_for<Kernel, infer_row_shapes>(type, device, shape_inference);
}

}  // namespace qexport
