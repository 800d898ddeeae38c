#include "quantum_attention.h"

#include "ort_cuda.h"
#include "ort_op.h"
#include "qexport/quantum_attention_check.h"
#include "shape_inference.h"

namespace qexport {
namespace {

constexpr const char* kInputs[] = {"Q",    "K",          "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen",
                                   "seed", "key_summary"};

template <Device kDevice>
struct Kernel : OpOn<kDevice> {
  static constexpr const char* kName = "QuantumAttention";
  static constexpr size_t kInputCount = 9, kOutputCount = 6, kRequiredInputs = 3, kRequiredOutputs = 1;
  static OrtElementType input_type(OrtElementType type, size_t i) {
    if (i == 3) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // attn_mask: any type, checked in resolve_call
    if (i == 8) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    return i >= 6 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : type;
  }
  static OrtElementType output_type(OrtElementType type, size_t i) {
    return i >= 4 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : type;
  }

  QuantumAttentionAttributes attributes;

  explicit Kernel(const OrtKernelInfo* info) {
    if (const char* error = isa_error()) throw std::invalid_argument(error);
    const NodeAttributes node(info, kName);
    QuantumAttentionAttributes& a = attributes;
    a.strategy = node.text("strategy");
    a.num_samples = node.integers("num_samples");
    a.control_variate = node.integer("control_variate");
    a.precision = node.text("precision");
    a.error_tolerance = node.real("error_tolerance");
    a.residual = node.text("residual");
    a.layer = node.integer("layer");
    a.is_causal = node.integer("is_causal");
    a.softcap = node.real("softcap");
    a.qk_matmul_output_mode = node.integer("qk_matmul_output_mode");
    a.left_window_size = node.integer("left_window_size");
    a.right_window_size = node.integer("right_window_size");
    a.scale = 0.0f, a.q_num_heads = 0, a.kv_num_heads = 0;
    a.has_scale = node.optional("scale", &a.scale);
    if (node.optional("q_num_heads", &a.q_num_heads) && a.q_num_heads == 0) a.q_num_heads = -1;
    if (node.optional("kv_num_heads", &a.kv_num_heads) && a.kv_num_heads == 0) a.kv_num_heads = -1;
    check_attributes(a);
  }

  void compute(OrtKernelContext* context) const {
    const auto input = [&](size_t i) { return ort_input(context, i, kName, kInputs[i]); };
    QuantumAttentionInputs in{input(0), input(1), input(2), input(3), input(4), input(5), nullptr, {}, 0, input(8)};
    const TensorView nonpad = input(6);
    const int64_t* seed = ort_seed(input(7), kName);
    if (nonpad.present) in.nonpad_kv_seqlen = static_cast<const int64_t*>(nonpad.data), in.nonpad_shape = nonpad.shape;
    if (kDevice == Device::cpu && seed) in.seed = *seed;
    QuantumAttentionCall call = resolve_call(attributes, in);
    call.tensors.y = ort_output(context, 0, call.y);
    call.tensors.present_key = ort_output(context, 1, call.present_key);
    call.tensors.present_value = ort_output(context, 2, call.present_value);
    call.tensors.qk_matmul_output = ort_output(context, 3, call.qk_matmul_output);
    call.tensors.error_estimate = static_cast<float*>(ort_output(context, 4, call.error_estimate));
    call.tensors.present_key_summary = static_cast<float*>(ort_output(context, 5, call.key_summary));
    if (call.tensors.error_estimate) check_error_estimate(call.params.strategy);
    check_outputs(call);
    if constexpr (kDevice == Device::cuda) {
      const CudaKernels& cuda = *cuda_plugin().kernels;
      const size_t bytes = cuda.quantum_attention_scratch_bytes(call.params, call.tensors);
      ort_cuda(context, kName, cuda.quantum_attention, bytes, call.params, call.tensors, seed);
    } else {
      const ParallelFor parallel = ort_parallel(context);
      const OrtScratch scratch(context, Device::cpu,
                               quantum_attention_cpu_scratch_bytes(call.params, call.tensors, parallel));
      quantum_attention_cpu(call.params, call.tensors, scratch.data(), parallel);
    }
  }
};

}  // namespace

const OrtCustomOp* quantum_attention_op(DType type, Device device, bool shape_inference) {
  return op_for<Kernel, infer_attention_shapes>(type, device, shape_inference);
}

}  // namespace qexport
