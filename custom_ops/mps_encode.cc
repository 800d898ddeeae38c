#include "mps_encode.h"

#include "ort_op.h"
#include "qexport/mps_check.h"
#include "shape_inference.h"

namespace qexport {
namespace {

struct Kernel : OpOn<Device::cpu> {
  static constexpr const char* kName = "MPSEncode";
  static constexpr size_t kInputCount = 1, kOutputCount = 4, kRequiredInputs = 1, kRequiredOutputs = 4;
  static OrtElementType input_type(OrtElementType type, size_t) { return type; }
  static OrtElementType output_type(OrtElementType type, size_t i) {
    return i == 0 ? type : i == 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
  }

  MpsEncodeAttributes attributes;

  explicit Kernel(const OrtKernelInfo* info) {
    const NodeAttributes node(info, kName);
    attributes = {node.integers("row_factors"), node.integers("col_factors"), node.integer("bond_dim"), node.real("tol")};
    check_attributes(attributes);
  }

  void compute(OrtKernelContext* context) const {
    const TensorView matrix = ort_input(context, 0, kName, "matrix");
    const MpsEncodeCall call = resolve_call(attributes, matrix);
    void* cores = ort_output(context, 0, call.cores);
    void* ranks = ort_output(context, 1, call.ranks);
    void* error = ort_output(context, 2, call.error);
    void* bound = ort_output(context, 3, call.error);
    const MpsEncodeTensors tensors{matrix.data, cores, static_cast<int64_t*>(ranks), static_cast<double*>(error),
                                   static_cast<double*>(bound)};
    check_status(kName, mps_encode_cpu(call.params, tensors, ort_parallel(context)));
  }
};

}  // namespace

const OrtCustomOp* mps_encode_op(DType type, bool shape_inference) {
  return op_for<Kernel, infer_mps_encode_shapes>(type, shape_inference);
}

}  // namespace qexport
