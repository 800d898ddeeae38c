// What onnxruntime asks about an op, answered once for all ops.
//
// A Kernel derives from OpOn a device and has: kName, kInputCount, kRequiredInputs, kOutputCount, kRequiredOutputs;
// input_type(type, i) and output_type(type, i), where `type` is the one that the variant of the op is for; a constructor
// from OrtKernelInfo; compute.
#pragma once

#include <climits>

#include "ort_api.h"

namespace qexport {

using OrtElementType = ONNXTensorElementDataType;
using InferShapes = void (*)(OrtShapeInferContext*);

struct TypedOp : OrtCustomOp {
  OrtElementType type;
};

template <Device kWhere>
struct OpOn {
  // Null: the CPU.
  static constexpr const char* kProvider = kWhere == Device::cuda ? "CUDAExecutionProvider" : nullptr;
  // Whether input i lies in host memory on every device; for ops to override.
  static bool on_host(size_t) { return false; }
};

inline OrtElementType ort_type(DType type) {
  switch (type) {
    case DType::f16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case DType::bf16:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case DType::f64:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
    default:
      return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
}

template <class Kernel>
TypedOp make_op(DType type) {
  TypedOp op{};
  op.version = kOrtApiVersion;
  op.type = ort_type(type);
  op.GetName = [](const OrtCustomOp*) { return Kernel::kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return Kernel::kProvider; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return Kernel::kInputCount; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return Kernel::kOutputCount; };
  op.GetInputType = [](const OrtCustomOp* self, size_t i) {
    return Kernel::input_type(static_cast<const TypedOp*>(self)->type, i);
  };
  op.GetOutputType = [](const OrtCustomOp* self, size_t i) {
    return Kernel::output_type(static_cast<const TypedOp*>(self)->type, i);
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i < Kernel::kRequiredInputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i < Kernel::kRequiredOutputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t i) {
    return Kernel::on_host(i) ? OrtMemTypeCPUInput : OrtMemTypeDefault;
  };
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

// The op for tensors of one type; lives as long as the library. With `infer` it tells onnxruntime the shapes of its outputs.
template <class Kernel, InferShapes kInfer>
const OrtCustomOp* op_for(DType type, bool infer) {
  static TypedOp ops[] = {make_op<Kernel>(DType::f32), make_op<Kernel>(DType::f16), make_op<Kernel>(DType::bf16),
                          make_op<Kernel>(DType::f64)};
  for (TypedOp& op : ops) {
    if (op.type != ort_type(type)) continue;
    if (infer) {
      op.InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
        return ort_guard([&] { kInfer(context); });
      };
    }
    return &op;
  }
  return nullptr;
}

template <template <Device> class Kernel, InferShapes kInfer>
const OrtCustomOp* op_for(DType type, Device device, bool infer) {
  return device == Device::cuda ? op_for<Kernel<Device::cuda>, kInfer>(type, infer)
                                : op_for<Kernel<Device::cpu>, kInfer>(type, infer);
}

}  // namespace qexport
