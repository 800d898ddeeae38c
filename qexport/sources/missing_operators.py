"""ONNX nodes of operators that torch.onnx.export has none for: grouped products and checks of values.

Mixtures of experts multiply rows (S, i), sorted by their expert, with weights (E, i, o); the rows of each expert end at ends
(E,); the result is (S, o). Checks, whose results nothing uses, leave the graph again.
"""

import onnxscript
from onnxscript import BOOL
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.tensor_typing import TFloat, TInt


@onnxscript.script(default_opset=op)
def _grouped_product(rows: TFloat, weights: TFloat, ends: TInt) -> TFloat:
    zero = op.Constant(value_ints=[0])
    start = op.Identity(zero)
    # Not one growing tensor, which would be copied for each expert. It begins with no rows, in the type of the others.
    none = op.ConstantOfShape(op.Concat(zero, op.Shape(weights, start=2, end=3), axis=0))
    parts = op.SequenceConstruct(op.CastLike(none, rows))
    for expert in range(op.Squeeze(op.Shape(weights, start=0, end=1))):
        end = op.Unsqueeze(op.Cast(op.Gather(ends, expert), to=7), zero)
        if op.Squeeze(start < end):  # experts without rows are not read
            own = op.MatMul(op.Slice(rows, start, end, zero), op.Gather(weights, expert))
            parts = op.SequenceInsert(parts, own)
        else:
            parts = op.Identity(parts)
        start = op.Identity(end)
    return op.ConcatFromSequence(parts, axis=0)


def _grouped(rows, weights, offs=None, bias=None, out_dtype=None):
    if offs is None or bias is not None or out_dtype is not None:
        raise NotImplementedError("a grouped product with a bias, another type or without offsets")
    return _grouped_product(rows, weights, offs)


def _is_all_true(flags: BOOL) -> BOOL:
    return op.Cast(op.ReduceMin(op.Cast(flags, to=6), keepdims=0), to=9)


def translation_table() -> dict:
    """What torch.onnx.export takes as `custom_translation_table`: the operators of torch and transformers."""
    import torch

    operators = [torch.ops.aten._grouped_mm.default]
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        operators.append(torch.ops.transformers.grouped_mm_fallback.default)
    return dict.fromkeys(operators, _grouped) | {torch.ops.aten._is_all_true.default: _is_all_true}
