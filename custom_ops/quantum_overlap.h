// com.qexport:QuantumOverlap for onnxruntime: attributes, shapes, outputs; the kernel does the rest.
#pragma once

#include "ort_api.h"

namespace qexport {

// The OrtCustomOp for tensors of one type; lives as long as the library. With shape_inference the op tells onnxruntime the
// shapes of its outputs.
const OrtCustomOp* quantum_overlap_op(DType type, bool shape_inference);

}  // namespace qexport
