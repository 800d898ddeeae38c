// What onnxruntime is told about the shapes of outputs while it loads a model.
#pragma once

#include "ort_api.h"

namespace qexport {

// QuantumAttention. Sets the type and shape of each output of the node from those of its inputs, keeping symbolic
// dimensions. Outputs whose rank cannot be told are left alone.
void infer_attention_shapes(OrtShapeInferContext* context);

// Ops on rows of probabilities: output 0 is like input 0, output 1 has a number per row, in the type of input 1.
void infer_row_shapes(OrtShapeInferContext* context);

// QuantumOverlap: (..., m, d) and (..., k, d) give (..., m, k).
void infer_overlap_shapes(OrtShapeInferContext* context);

// MPSEncode and MPSDecode: leading axes are those of the input, sizes follow from the attributes.
void infer_mps_encode_shapes(OrtShapeInferContext* context);
void infer_mps_decode_shapes(OrtShapeInferContext* context);

// MPSAttention: (..., cols, features) gives (..., rows, features); MPOLinear: (..., rows) gives (..., cols).
void infer_mps_attention_shapes(OrtShapeInferContext* context);
void infer_mpo_linear_shapes(OrtShapeInferContext* context);

}  // namespace qexport
