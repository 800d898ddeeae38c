"""Sinks: a score beside those of the keys that takes weight from them and has no value.

    Softmax([scale Q K^T + mask, sink]) without its last column, times V

is attention with one key more, of value 0. Q gets an axis more, -sink / scale, along which the keys are 1 and that key is 0:
all scores of a query are lower by its sink, which a softmax does not see, and that of the new key is 0. More axes, where
keys are 0, fill heads up to a multiple of 8: tiles of the CUDA kernels ask for rows of whole 16 bytes.
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
    count = 8 - (known_size(k, 3) or -1) % 8
    per_scale = builder.node("CastLike", builder.const(np.float32(-1 / scale)), sink, like=sink, shape=[])
    level = builder.node("Mul", sink, per_scale, like=sink, shape=sink.shape)
    q = _appended(builder, q, 3, builder.node("CastLike", level, q, like=q, shape=sink.shape), count)
    k, v = (_appended(builder, x, 2, 0.0) for x in (_appended(builder, k, 3, np.eye(count)[0], count), v))
    if mask is not None:  # nothing added, or true
        mask = _appended(builder, mask, rank(mask) - 1, 0.0 if mask.dtype == q.dtype else 1.0)
    return q, k, v, mask


def without_sink(node: ir.Node) -> tuple[ir.Value | None, ...] | None:
    """K, V and the mask of an Attention as they are without the key of `add_sink`; None where it has no such key."""
    k, v = (_shorter(value, 2, 0.0) for value in node.inputs[1:3])
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if k is None or v is None:
        return None
    if mask is None:
        return k, v, None
    mask = _shorter(mask, (rank(mask) or 0) - 1, float(mask.dtype == ir.DataType.BOOL))
    return None if mask is None else (k, v, mask)


def _shorter(value: ir.Value, axis: int, number: float) -> ir.Value | None:
    """What `_appended` gave one place more along an axis, which holds `number`; None where it did not."""
    node = value.producer()
    if not is_op(node, "Concat") or attribute(node, "axis") != axis or len(node.inputs) != 2:
        return None
    (body, last), what = node.inputs, None
    if is_op(last.producer(), "Expand") and is_op(cast := last.producer().inputs[0].producer(), "CastLike"):
        what = constant(cast.inputs[0])
    return body if known_size(last, axis) == 1 and what is not None and (what == number).all() else None


def _appended(builder: Builder, value: ir.Value, axis: int, what, count: int = 1) -> ir.Value:
    """A value with `count` places more along an axis, which hold `what`, a value or numbers."""
    if not isinstance(what, ir.Value):
        what = np.asarray(what, np.float32)
        what = builder.node("CastLike", builder.const(what), value, like=value, shape=what.shape)
    n, own = rank(value), known_size(value, axis)
    target = builder.concat(*(count if a == axis else builder.axes(value, a, a + 1) for a in range(n)))
    shape = [size(value, a) for a in range(n)]
    shape[axis] = count
    more = builder.node("Expand", what, target, like=value, shape=shape)
    shape[axis] = own and own + count
    return builder.node("Concat", value, more, like=value, shape=shape, axis=axis)
