"""Sinks: a score beside those of the keys that takes weight from them and has no value.

    Softmax([scale Q K^T + mask, sink]) without its last column, times V

is attention with one key more, of value 0. Q gets an axis more, -sink / scale, along which the keys are 1 and that key is 0:
all scores of a query are lower by its sink, which a softmax does not see, and that of the new key is 0.
"""

import numpy as np
import onnx_ir as ir

from qexport.rewrite.graph import Builder, attribute, is_op
from qexport.rewrite.values import constant, known_size, rank, size


def is_sink(node: ir.Node) -> bool:
    """Whether a node puts one column behind others."""
    axes = rank(node.outputs[0])
    last = is_op(node, "Concat") and axes is not None and attribute(node, "axis") in (-1, axes - 1)
    return last and len(node.inputs) == 2 and known_size(node.inputs[1], -1) == 1


def drops_last(node: ir.Node) -> bool:
    """Whether a node is a Slice of every column but the last."""
    if not is_op(node, "Slice") or len(node.inputs) < 4 or (last := (rank(node.inputs[0]) or 0) - 1) < 0:
        return False
    found = [None if (array := constant(x)) is None else array.tolist() for x in node.inputs[1:]]
    return found[:2] == [[0], [-1]] and found[2] in ([-1], [last]) and found[3:] in ([], [[1]])


def add_sink(
    builder: Builder, sink: ir.Value, scale: float, operands: tuple[ir.Value, ...], mask: ir.Value | None
) -> tuple[ir.Value, ...]:
    """Q, K, V and the mask of an Attention with the key of a sink, which is broadcastable to (batch, heads, queries, 1)."""
    q, k, v = operands
    per_scale = builder.node("CastLike", builder.const(np.float32(-1 / scale)), sink, like=sink, shape=[])
    level = builder.node("Mul", sink, per_scale, like=sink, shape=sink.shape)
    q = _appended(builder, q, 3, builder.node("CastLike", level, q, like=q, shape=sink.shape))
    k = _appended(builder, _appended(builder, k, 3, 1.0), 2, 0.0)
    v = _appended(builder, v, 2, 0.0)
    if mask is not None:  # nothing added, or true
        mask = _appended(builder, mask, rank(mask) - 1, 0.0 if mask.dtype == q.dtype else 1.0)
    return q, k, v, mask


def _appended(builder: Builder, value: ir.Value, axis: int, what: ir.Value | float) -> ir.Value:
    """A value with one place more along an axis, which holds `what`."""
    if not isinstance(what, ir.Value):
        what = builder.node("CastLike", builder.const(np.float32(what)), value, like=value, shape=[])
    n, own = rank(value), known_size(value, axis)
    target = builder.concat(*(1 if a == axis else builder.axes(value, a, a + 1) for a in range(n)))
    shape = [size(value, a) for a in range(n)]
    shape[axis] = 1
    more = builder.node("Expand", what, target, like=value, shape=shape)
    shape[axis] = own and own + 1
    return builder.node("Concat", value, more, like=value, shape=shape, axis=axis)
