// What onnxruntime is told about the shapes of QuantumAttention's outputs while it loads a model.
#pragma once

#include "ort_api.h"

namespace qexport {

// Sets the type and shape of each output of the node from those of its inputs, keeping symbolic dimensions. Outputs whose
// rank cannot be told are left alone.
void infer_attention_shapes(OrtShapeInferContext* context);

}  // namespace qexport
