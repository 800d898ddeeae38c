"""float16 alone: a Reshape that changes nothing between a Transpose and the MatMul with weights that reads it.

On the CPU onnxruntime (1.23 to 1.32, at its default optimisation) fuses such a Transpose with the MatMul, which it computes
in float32, and ends the process with a segmentation fault when it then takes the casts of the weights away.
"""

import onnx_ir as ir

from qexport.rewrite.graph import Builder, is_op
from qexport.rewrite.values import rank


def part_transposes(model: ir.Model) -> None:
    """Keep onnxruntime from fusing a Transpose into a MatMul with float16 weights."""
    for node in list(model.graph):
        if not is_op(node, "MatMul") or not any(_is_half_constant(value) for value in node.inputs):
            continue
        for i, value in enumerate(node.inputs):
            if is_op(value.producer(), "Transpose") and (axes := rank(value)):
                kept = Builder(node).node("Reshape", value, [0] * axes, like=value, shape=value.shape)
                node.replace_input_with(i, kept)


def _is_half_constant(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT16 and value.const_value is not None
