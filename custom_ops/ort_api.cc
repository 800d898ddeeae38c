#include "ort_api.h"

#include <algorithm>
#include <thread>

namespace qexport {

const OrtApi* ort = nullptr;

namespace {

// Type and shape of a tensor, released at the end of the scope.
struct TensorInfo {
  explicit TensorInfo(const OrtValue* value) { ort_check(ort->GetTensorTypeAndShape(value, &info)); }
  ~TensorInfo() { ort->ReleaseTensorTypeAndShapeInfo(info); }
  TensorInfo(const TensorInfo&) = delete;
  TensorInfo& operator=(const TensorInfo&) = delete;
  OrtTensorTypeAndShapeInfo* info = nullptr;
};

}  // namespace

TensorView ort_input(const OrtKernelContext* context, size_t index, const char* op_name, const char* input_name,
                     size_t most) {
  TensorView view{};
  size_t count = 0;
  ort_check(ort->KernelContext_GetInputCount(context, &count));
  if (index >= count) return view;
  const OrtValue* value = nullptr;
  ort_check(ort->KernelContext_GetInput(context, index, &value));
  if (!value) return view;
  const TensorInfo tensor(value);
  ONNXTensorElementDataType type;
  ort_check(ort->GetTensorElementType(tensor.info, &type));
  const auto where = [&] { return "[" + std::string(op_name) + "] " + input_name; };
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      view.type = DType::f32;
      break;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      view.type = DType::f16;
      break;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
      view.type = DType::bf16;
      break;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL:
      view.type = DType::boolean;
      break;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64:
      view.type = DType::i64;
      break;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE:
      view.type = DType::f64;
      break;
    default:
      throw std::invalid_argument(where() +
                                  " must be float, float16, bfloat16, double, int64 or bool, got ONNX element type " +
                                  std::to_string(static_cast<int>(type)));
  }
  size_t rank = 0;
  ort_check(ort->GetDimensionsCount(tensor.info, &rank));
  if (rank > most) {
    throw std::invalid_argument(where() + " must have at most " + std::to_string(most) + " dimensions, got " +
                                std::to_string(rank));
  }
  view.shape.rank = static_cast<int>(rank);
  ort_check(ort->GetDimensions(tensor.info, view.shape.dim, rank));
  // The data of an input is only read; the C API has no const accessor.
  void* data = nullptr;
  ort_check(ort->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  view.data = data;
  view.present = true;
  return view;
}

const int64_t* ort_seed(const TensorView& seed, const char* op_name) {
  if (!seed.present) return nullptr;
  for (int i = 0; i < seed.shape.rank; ++i) {
    if (seed.shape.dim[i] != 1) {
      throw std::invalid_argument("[" + std::string(op_name) + "] seed has shape " + to_string(seed.shape) +
                                  ", expected a scalar");
    }
  }
  return static_cast<const int64_t*>(seed.data);
}

void* ort_output(OrtKernelContext* context, size_t index, const Shape& shape) {
  size_t count = 0;
  ort_check(ort->KernelContext_GetOutputCount(context, &count));
  if (index >= count) return nullptr;
  OrtValue* value = nullptr;
  ort_check(ort->KernelContext_GetOutput(context, index, shape.dim, static_cast<size_t>(shape.rank), &value));
  if (!value) return nullptr;
  void* data = nullptr;
  ort_check(ort->GetTensorMutableData(value, &data));
  return data;
}

// KernelContext_GetScratchBuffer, the second function that version 18 of the API put behind those of version 17, with which
// the headers in use may end. It needs a stream: on the CPU it ends the process.
static OrtStatus* allocate_on_stream(const OrtKernelContext* context, const OrtMemoryInfo* memory, size_t bytes,
                                     void** data) {
  using Function = OrtStatus*(ORT_API_CALL*)(const OrtKernelContext*, const OrtMemoryInfo*, size_t, void**);
  const auto* last = reinterpret_cast<const Function*>(&ort->SessionOptionsAppendExecutionProvider_OpenVINO_V2);
  return last[2](context, memory, bytes, data);
}

OrtScratch::OrtScratch(const OrtKernelContext* context, Device device, size_t bytes) {
  const OrtValue* value = nullptr;
  ort_check(ort->KernelContext_GetInput(context, 0, &value));
  const OrtMemoryInfo* memory = nullptr;
  ort_check(ort->GetTensorMemoryInfo(value, &memory));
  ort_check(ort->KernelContext_GetAllocator(context, memory, &allocator_));
  OrtStatus* status = device == Device::cuda ? allocate_on_stream(context, memory, bytes, &data_)
                                             : ort->AllocatorAlloc(allocator_, bytes, &data_);
  if (status) ort->ReleaseAllocator(allocator_);
  ort_check(status);
}

OrtScratch::~OrtScratch() {
  if (OrtStatus* status = ort->AllocatorFree(allocator_, data_)) ort->ReleaseStatus(status);
  ort->ReleaseAllocator(allocator_);
}

ParallelFor ort_parallel(const OrtKernelContext* context) {
  static const int threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const auto run = [](void* pool, void (*body)(void*, size_t), size_t total, void* data) {
    // The status can only report a null argument.
    OrtStatus* status = ort->KernelContext_ParallelFor(static_cast<const OrtKernelContext*>(pool), body, total, 0, data);
    if (status) ort->ReleaseStatus(status);
  };
  return {run, const_cast<OrtKernelContext*>(context), threads};
}

}  // namespace qexport
