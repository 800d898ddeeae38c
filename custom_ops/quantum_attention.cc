#include "quantum_attention.h"

#include <climits>

#include "shape_inference.h"

namespace qexport {
namespace {

constexpr const char* kName = "QuantumAttention";
constexpr const char* kInputs[] = {"Q",    "K",          "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen",
                                   "seed", "key_summary"};
constexpr size_t kInputCount = 9, kOutputCount = 6, kRequiredInputs = 3, kRequiredOutputs = 1;

struct Kernel {
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
    if (in.attn_mask.present && in.attn_mask.type == DType::i64) {
      throw std::invalid_argument("[QuantumAttention] attn_mask must be float, float16, bfloat16 or bool, got int64");
    }
    const TensorView nonpad = input(6), seed = input(7);
    if (nonpad.present) in.nonpad_kv_seqlen = static_cast<const int64_t*>(nonpad.data), in.nonpad_shape = nonpad.shape;
    if (seed.present) {
      for (int i = 0; i < seed.shape.rank; ++i) {
        if (seed.shape.dim[i] != 1) {
          throw std::invalid_argument("[QuantumAttention] seed has shape " + to_string(seed.shape) + ", expected a scalar");
        }
      }
      in.seed = *static_cast<const int64_t*>(seed.data);
    }
    QuantumAttentionCall call = resolve_call(attributes, in);
    call.tensors.y = ort_output(context, 0, call.y);
    call.tensors.present_key = ort_output(context, 1, call.present_key);
    call.tensors.present_value = ort_output(context, 2, call.present_value);
    call.tensors.qk_matmul_output = ort_output(context, 3, call.qk_matmul_output);
    call.tensors.error_estimate = static_cast<float*>(ort_output(context, 4, call.error_estimate));
    call.tensors.present_key_summary = static_cast<float*>(ort_output(context, 5, call.key_summary));
    if (call.tensors.error_estimate) check_error_estimate(call.params.strategy);
    check_outputs(call);
    const ParallelFor parallel = ort_parallel(context);
    const OrtScratch scratch(context, quantum_attention_cpu_scratch_bytes(call.params, call.tensors, parallel));
    quantum_attention_cpu(call.params, call.tensors, scratch.data(), parallel);
  }
};

struct Op : OrtCustomOp {
  ONNXTensorElementDataType type;
};

Op make_op(ONNXTensorElementDataType type) {
  Op op{};
  op.version = kOrtApiVersion;
  op.type = type;
  op.GetName = [](const OrtCustomOp*) { return kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return kInputCount; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return kOutputCount; };
  op.GetInputType = [](const OrtCustomOp* self, size_t i) {
    if (i == 3) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;  // attn_mask: any type, checked in compute
    if (i == 8) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    return i >= 6 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : static_cast<const Op*>(self)->type;
  };
  op.GetOutputType = [](const OrtCustomOp* self, size_t i) {
    return i >= 4 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : static_cast<const Op*>(self)->type;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i < kRequiredInputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i < kRequiredOutputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
    return ort_guard([&] { *kernel = new Kernel(info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return ort_guard([&] { static_cast<const Kernel*>(kernel)->compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
  return op;
}

}  // namespace

const OrtCustomOp* quantum_attention_op(DType type, bool shape_inference) {
  static Op ops[] = {make_op(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT), make_op(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16),
                     make_op(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16)};
  Op& op = ops[type == DType::f32 ? 0 : type == DType::f16 ? 1 : 2];
  if (shape_inference) {
    op.InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
      return ort_guard([&] { infer_attention_shapes(context); });
    };
  }
  return &op;
}

}  // namespace qexport
