#include "shape_inference.h"

#include <atomic>

#include "qexport/mps_check.h"

namespace qexport {
namespace {

// A dimension: a size, or a name.
struct Dim {
  int64_t size;  // -1: not known
  std::string name;
};
using Dims = std::vector<Dim>;

constexpr int64_t kUnknown = -1;

// onnxruntime takes an unnamed unknown dimension for the size -1 and warns at every run: each gets a name of its own.
Dim unknown_dim() {
  static std::atomic<int64_t> count{0};
  return {kUnknown, "qexport_unknown_" + std::to_string(count.fetch_add(1))};
}

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
  for (size_t i = 0; i < rank; ++i) {
    const bool named = names[i] && *names[i];
    input.dims.push_back(sizes[i] >= 0 ? Dim{sizes[i], ""} : named ? Dim{kUnknown, names[i]} : unknown_dim());
  }
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

std::vector<int64_t> ints_attribute(OrtShapeInferContext* context, const char* name) {
  const OrtOpAttr* attribute = nullptr;
  std::vector<int64_t> values(64);  // sites: a factor of 2 or more each
  size_t bytes = 0;
  OrtStatus* status = ort->ShapeInferContext_GetAttribute(context, name, &attribute);
  if (!status && attribute) {
    status = ort->ReadOpAttr(attribute, ORT_OP_ATTR_INTS, values.data(), values.size() * sizeof(int64_t), &bytes);
  }
  if (status) ort->ReleaseStatus(status);
  values.resize(status ? 0 : bytes / sizeof(int64_t));
  return values;
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

Dim quotient(const Dim& dim, int64_t n) { return dim.size >= 0 && n > 0 ? Dim{dim.size / n, ""} : unknown_dim(); }

Dim sized(int64_t n) { return n > 0 ? Dim{n, ""} : unknown_dim(); }

// Some versions of onnxruntime leave absent inputs out of the list, others give them no type, so that the place of an input
// behind V tells nothing.
// What can be told: nonpad_kv_seqlen and seed are int64 and key_summary, which needs the former, stands behind them.
// past_key and past_value come together, so that in front of them none, attn_mask, the past, or attn_mask and the past are
// there.
struct PastInfo {
  bool present;
  InputInfo key, summary;
};

PastInfo past_info(OrtShapeInferContext* context) {
  size_t count = 0;
  ort_check(ort->ShapeInferContext_GetInputCount(context, &count));
  std::vector<InputInfo> others;
  InputInfo summary{false, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}};
  bool behind = false;
  for (size_t i = 3; i < count; ++i) {
    InputInfo input = input_info(context, i);
    const bool absent = input.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    if (absent) continue;
    if (input.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) {
      behind = true;
    } else if (behind) {
      summary = std::move(input);
    } else {
      others.push_back(std::move(input));
    }
  }
  if (others.size() < 2) return {false, {}, summary};
  return {true, others[others.size() - 2], summary};
}

// past_len + kv_len, a size or a name.
Dim total_len(const Dim& kv_len, const PastInfo& past) {
  if (!past.present) return kv_len;
  if (past.key.dims.size() != 4) return unknown_dim();
  const Dim& past_len = past.key.dims[2];
  if (past_len.size >= 0 && kv_len.size >= 0) return {past_len.size + kv_len.size, ""};
  const auto text = [](const Dim& dim) { return dim.size >= 0 ? std::to_string(dim.size) : dim.name; };
  return {kUnknown, text(past_len) + " + " + text(kv_len)};
}

}  // namespace

void infer_attention_shapes(OrtShapeInferContext* context) {
  const InputInfo q = input_info(context, 0), k = input_info(context, 1), v = input_info(context, 2);
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
    set_output(context, 0, q.type,
               {q.dims[0], q.dims[1], size.size >= 0 && heads > 0 ? Dim{size.size * heads, ""} : unknown_dim()});
    q_heads = sized(heads), q_len = q.dims[1], kv_len = k.dims[1];
    present_key = {k.dims[0], sized(kv_heads), kv_len, quotient(k.dims[2], kv_heads)};
    present_value = {k.dims[0], sized(kv_heads), kv_len, size};
  } else {
    return;
  }
  const PastInfo past = past_info(context);
  const Dim total = total_len(kv_len, past);
  present_key[2] = present_value[2] = total;
  set_output(context, 1, q.type, present_key);
  set_output(context, 2, q.type, present_value);
  set_output(context, 3, q.type, {q.dims[0], q_heads, q_len, total});
  set_output(context, 4, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {q.dims[0], q_heads});
  if (past.summary.known) set_output(context, 5, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, past.summary.dims);
}

void infer_row_shapes(OrtShapeInferContext* context) {
  const InputInfo rows = input_info(context, 0), other = input_info(context, 1);
  if (!rows.known) return;
  set_output(context, 0, rows.type, rows.dims);
  const bool with_leak =
      other.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || other.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
  if (with_leak) set_output(context, 1, other.type, Dims(rows.dims.begin(), rows.dims.end() - 1));
}

void infer_overlap_shapes(OrtShapeInferContext* context) {
  const InputInfo queries = input_info(context, 0), keys = input_info(context, 1);
  if (!queries.known || !keys.known || queries.dims.size() < 2 || queries.dims.size() != keys.dims.size()) return;
  Dims dims = queries.dims;
  dims.back() = keys.dims[keys.dims.size() - 2];
  set_output(context, 0, queries.type, dims);
}

void infer_mps_encode_shapes(OrtShapeInferContext* context) {
  const InputInfo matrix = input_info(context, 0);
  if (!matrix.known || matrix.dims.size() < 2) return;
  const std::vector<int64_t> row_factors = ints_attribute(context, "row_factors");
  const std::vector<int64_t> col_factors = ints_attribute(context, "col_factors");
  const int64_t bond_dim = int_attribute(context, "bond_dim");
  check_attributes(MpsEncodeAttributes{row_factors, col_factors, bond_dim, 0.0});
  const std::vector<int64_t> bonds = mps_bonds(row_factors, col_factors, bond_dim);
  const int64_t sites = static_cast<int64_t>(row_factors.size());
  const MpsLayout layout{1, 1, sites, row_factors.data(), col_factors.data(), bonds.data()};
  const Dims batch(matrix.dims.begin(), matrix.dims.end() - 2);
  Dims cores = batch, ranks = batch;
  cores.push_back({mps_numbers(layout), ""});
  ranks.push_back({sites + 1, ""});
  set_output(context, 0, matrix.type, cores);
  set_output(context, 1, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, ranks);
  set_output(context, 2, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, batch);
  set_output(context, 3, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, batch);
}

void infer_mps_decode_shapes(OrtShapeInferContext* context) {
  const InputInfo cores = input_info(context, 0);
  if (!cores.known) return;
  Dims matrix(cores.dims.begin(), cores.dims.end() - 1);
  matrix.push_back(sized(int_attribute(context, "rows")));
  matrix.push_back(sized(int_attribute(context, "cols")));
  set_output(context, 0, cores.type, matrix);
}

void infer_mps_attention_shapes(OrtShapeInferContext* context) {
  InputInfo V = input_info(context, 1);
  if (!V.known || V.dims.size() < 2) return;
  V.dims[V.dims.size() - 2] = sized(int_attribute(context, "rows"));
  set_output(context, 0, V.type, V.dims);
}

void infer_mpo_linear_shapes(OrtShapeInferContext* context) {
  InputInfo x = input_info(context, 0);
  if (!x.known) return;
  x.dims.back() = sized(int_attribute(context, "cols"));
  set_output(context, 0, x.type, x.dims);
}

}  // namespace qexport
