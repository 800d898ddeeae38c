// com.qexport:QuantumAttention for onnxruntime: attributes, shapes, outputs; the kernel does the rest.
#pragma once

#include "ort_api.h"

namespace qexport {

// The OrtCustomOp for tensors of one type on a device; lives as long as the library. With shape_inference the op tells
// onnxruntime the shapes of its outputs.
const OrtCustomOp* quantum_attention_op(DType type, Device device, bool shape_inference);

}  // namespace qexport
