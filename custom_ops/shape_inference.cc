#include "shape_inference.h"

namespace qexport {
namespace {

// A dimension: a size, or a name ("" where nothing is known).
struct Dim {
  int64_t size;  // -1: not known
  std::string name;
};
using Dims = std::vector<Dim>;

constexpr int64_t kUnknown = -1;

struct InputInfo {
  bool known;
  ONNXTensorElementDataType type;
  Dims dims;
};

InputInfo input_info(OrtShapeInferContext* context, size_t index) {
  size_t count = 0;
  ort_check(ort->ShapeInferContext_GetInputCount(context, &count));
  InputInfo input{false, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}};
  if (index >= count) return input;
  // The context owns the info.
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* status = ort->ShapeInferContext_GetInputTypeShape(context, index, &info)) {
    ort->ReleaseStatus(status);
    return input;
  }
  if (!info) return input;
  size_t rank = 0;
  ort_check(ort->GetTensorElementType(info, &input.type));
  ort_check(ort->GetDimensionsCount(info, &rank));
  std::vector<int64_t> sizes(rank);
  std::vector<const char*> names(rank);
  ort_check(ort->GetDimensions(info, sizes.data(), rank));
  ort_check(ort->GetSymbolicDimensions(info, names.data(), rank));
  for (size_t i = 0; i < rank; ++i) input.dims.push_back({sizes[i] < 0 ? kUnknown : sizes[i], names[i] ? names[i] : ""});
  input.known = rank > 0;
  return input;
}

int64_t int_attribute(OrtShapeInferContext* context, const char* name) {
  const OrtOpAttr* attribute = nullptr;
  int64_t value = 0;
  size_t size = 0;
  OrtStatus* status = ort->ShapeInferContext_GetAttribute(context, name, &attribute);
  if (!status && attribute) status = ort->ReadOpAttr(attribute, ORT_OP_ATTR_INT, &value, sizeof value, &size);
  if (status) {
    ort->ReleaseStatus(status);
    return 0;
  }
  return value;
}

void set_output(OrtShapeInferContext* context, size_t index, ONNXTensorElementDataType type, const Dims& dims) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  ort_check(ort->CreateTensorTypeAndShapeInfo(&info));
  std::vector<int64_t> sizes;
  std::vector<const char*> names;
  for (const Dim& dim : dims) {
    sizes.push_back(dim.size);
    names.push_back(dim.name.c_str());
  }
  OrtStatus* status = ort->SetTensorElementType(info, type);
  if (!status) status = ort->SetDimensions(info, sizes.data(), sizes.size());
  if (!status) status = ort->SetSymbolicDimensions(info, names.data(), names.size());
  if (!status) status = ort->ShapeInferContext_SetOutputTypeShape(context, index, info);
  ort->ReleaseTensorTypeAndShapeInfo(info);
  // An output that the node leaves out is an error to onnxruntime and of no interest here.
  if (status) ort->ReleaseStatus(status);
}

Dim quotient(const Dim& dim, int64_t n) { return dim.size >= 0 && n > 0 ? Dim{dim.size / n, ""} : Dim{kUnknown, ""}; }

Dim sized(int64_t n) { return {n > 0 ? n : kUnknown, ""}; }

}  // namespace

void infer_attention_shapes(OrtShapeInferContext* context) {
  const InputInfo q = input_info(context, 0), k = input_info(context, 1), v = input_info(context, 2);
  const InputInfo past = input_info(context, 4);
  if (!q.known || !k.known || !v.known || q.dims.size() != k.dims.size() || q.dims.size() != v.dims.size()) return;
  Dims present_key, present_value;
  Dim q_heads, q_len, kv_len;
  if (q.dims.size() == 4) {
    set_output(context, 0, q.type, {q.dims[0], q.dims[1], q.dims[2], v.dims[3]});
    q_heads = q.dims[1], q_len = q.dims[2], kv_len = k.dims[2];
    present_key = {k.dims[0], k.dims[1], kv_len, k.dims[3]};
    present_value = {k.dims[0], k.dims[1], kv_len, v.dims[3]};
  } else if (q.dims.size() == 3) {
    const int64_t heads = int_attribute(context, "q_num_heads"), kv_heads = int_attribute(context, "kv_num_heads");
    const Dim size = quotient(v.dims[2], kv_heads);
    set_output(context, 0, q.type, {q.dims[0], q.dims[1], size.size >= 0 && heads > 0 ? Dim{size.size * heads, ""} : Dim{kUnknown, ""}});
    q_heads = sized(heads), q_len = q.dims[1], kv_len = k.dims[1];
    present_key = {k.dims[0], sized(kv_heads), kv_len, quotient(k.dims[2], kv_heads)};
    present_value = {k.dims[0], sized(kv_heads), kv_len, size};
  } else {
    return;
  }
  Dim total = kv_len;
  if (past.known && past.dims.size() == 4) {
    const Dim& before = past.dims[2];
    total = before.size >= 0 && kv_len.size >= 0 ? Dim{before.size + kv_len.size, ""} : Dim{kUnknown, ""};
  } else if (past.known) {
    return;
  }
  present_key[2] = present_value[2] = total;
  set_output(context, 1, q.type, present_key);
  set_output(context, 2, q.type, present_value);
  set_output(context, 3, q.type, {q.dims[0], q_heads, q_len, total});
}

}  // namespace qexport
