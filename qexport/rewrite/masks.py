"""attn_mask from the biases and masks that the scores met on their way, in the form that Attention takes.

bias                       -> sum of the biases, in the type of Q
mask (fill <= -1e4)        -> boolean, true = attend
both                       -> where(mask, bias, lowest)
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qexport.rewrite import DeclinedError
from qexport.rewrite.graph import Builder, attribute, is_op
from qexport.rewrite.scores import inverted_mask
from qexport.rewrite.values import known_size, rank, size

_LOWEST = {
    ir.DataType.FLOAT: float(np.finfo(np.float32).min),
    ir.DataType.FLOAT16: float(np.finfo(np.float16).min),
    ir.DataType.BFLOAT16: float(ml_dtypes.finfo(ml_dtypes.bfloat16).min),
}


def attention_mask(builder: Builder, scores, heads, q: ir.Value, k: ir.Value) -> ir.Value | None:
    """The attn_mask of an Attention on Q and K (4-D), None when every key counts.

    Raises:
        DeclinedError: a bias is computed from the queries or keys themselves, or cannot be aligned with the heads.
    """
    origin = _origins(heads.scores.queries.value) | _origins(heads.scores.keys.value)
    for value, _, _ in scores.biases:
        if depends(value, origin):
            raise DeclinedError(
                "the bias added to its scores is computed from the queries or keys (disentangled attention); as attn_mask "
                "it would be a dense batch x heads x queries x keys tensor of every run"
            )
    dtype = q.dtype or ir.DataType.FLOAT
    bias, masks = None, list(scores.masks)
    for value, factor, where in scores.biases:
        if (flag := _padding_flag(value, factor)) is not None:
            masks.append((flag, True, where))
            continue
        term = _aligned(builder, value, where, heads, k)
        if factor != 1.0:
            term = builder.node(
                "Mul", term, builder.const(_number(factor, value.dtype or dtype)), like=term, shape=term.shape
            )
        term = _typed(builder, term, q, dtype)
        bias = term if bias is None else builder.node("Add", bias, term, like=q)
    keep = None
    for value, keeps, where in masks:
        flag = (
            value if value.dtype in (ir.DataType.BOOL, None) else builder.node("Cast", value, to=9, dtype=ir.DataType.BOOL)
        )
        flag = flag if keeps else _negated(builder, flag)
        flag = _aligned(builder, flag, where, heads, k)
        keep = flag if keep is None else builder.node("And", keep, flag, dtype=ir.DataType.BOOL)
    if keep is not None and bias is not None:
        return builder.node("Where", keep, bias, number_like(builder, _LOWEST[dtype], q), like=q)
    return keep if keep is not None else bias


def _padding_flag(value: ir.Value, factor: float) -> ir.Value | None:
    """m when a bias is (1 - m) * low with a 0/1 integer mask m, as exporters write padding; else None."""
    mask = inverted_mask(value, factor)
    cast = mask.producer() if mask is not None else None
    whole = is_op(cast, "Cast") and cast.inputs[0].dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
    return cast.inputs[0] if whole else None


def number_like(builder: Builder, value: float, q: ir.Value) -> ir.Value:
    """A number in the type of Q."""
    return builder.node("CastLike", builder.const(np.float32(value)), q, like=q, shape=[])


def _negated(builder: Builder, flag: ir.Value) -> ir.Value:
    node = flag.producer()
    return node.inputs[0] if is_op(node, "Not") else builder.node("Not", flag, dtype=ir.DataType.BOOL, shape=flag.shape)


def _number(value: float, dtype: ir.DataType) -> np.ndarray:
    return np.asarray(value).astype(dtype.numpy())


def _typed(builder: Builder, value: ir.Value, q: ir.Value, dtype: ir.DataType) -> ir.Value:
    """`value` in the type of Q; what its range cannot hold becomes its lowest number, not -inf."""
    if value.dtype == dtype:
        return value
    if dtype == ir.DataType.FLOAT16 and value.dtype in (ir.DataType.FLOAT, None):
        value = builder.node("Max", value, number_like(builder, _LOWEST[dtype], value), like=value, shape=value.shape)
    return builder.node("CastLike", value, q, like=q, shape=value.shape)


def _aligned(builder: Builder, value: ir.Value, where: int | None, heads, k: ir.Value) -> ir.Value:
    """A bias or mask that met scores of `where` axes, broadcastable to (batch, heads, q_len, kv_len)."""
    axes = rank(value)
    if axes is None:
        raise DeclinedError("the number of axes of its mask is unknown")
    if axes < 2:  # runtimes want at least (q_len, kv_len)
        value = builder.node(
            "Unsqueeze", value, list(range(2 - axes)), like=value, shape=[1] * (2 - axes) + list(value.shape or [])
        )
    value = heads.aligned(value, where)
    if known_size(value, -1) == 1 and known_size(k, 2) != 1:
        value = builder.node("Expand", value, builder.concat([1, 1, 1], builder.axes(k, 2, 3)), like=value)
    return value


def _origins(value: ir.Value, depth: int = 8) -> set[int]:
    """The ids of a Q or K operand and of what it was reshaped, scaled or projected from, up to and with its projection."""
    found = {id(value)}
    for _ in range(depth):
        node = value.producer()
        if node is None:
            break
        if is_op(node, "Mul", "Div", "Add", "Transpose", "Reshape", "Cast", "Identity", "Unsqueeze", "Squeeze"):
            data = [
                x
                for x in node.inputs
                if x is not None and x.const_value is None and not is_op(x.producer(), "Constant", "Concat")
            ]
            if len(data) != 1:
                break
            value = data[0]
            found.add(id(value))
        else:
            break
    return found


def depends(value: ir.Value, origin: set[int], limit: int = 3000) -> bool:
    """Whether a value is computed from one of `origin`, not counting what only asks for shapes."""
    seen, todo = set(), [value]
    while todo and len(seen) < limit:
        value = todo.pop()
        if value is None or id(value) in seen:
            continue
        if id(value) in origin:
            return True
        seen.add(id(value))
        node = value.producer()
        if node is not None and not is_op(node, "Shape", "Size", "Constant"):
            todo.extend(node.inputs)
    return False


def expand_masks(model: ir.Model) -> None:
    """Give every attn_mask of an Attention its query axis: runtimes broadcast batch and heads, but not queries or keys.

    A mask whose sizes are proven equal to Q's and K's is left as it is.
    """
    done: dict[tuple, ir.Value] = {}
    for node in [
        n for n in model.graph.all_nodes() if is_op(n, "Attention") and len(n.inputs) > 3 and n.inputs[3] is not None
    ]:
        q, mask = node.inputs[0], node.inputs[3]
        axis = 1 if attribute(node, "q_num_heads") else 2
        rows, axes = size(q, axis), rank(mask)
        if axes is not None and axes >= 2 and rows is not None and size(mask, -2) == rows:
            continue
        key = (id(mask), rows, id(node.graph)) if rows is not None else None
        if key is None or key not in done:
            builder = Builder(node)
            target = builder.concat([1, 1], builder.axes(q, axis, axis + 1), [1])
            shape = [None, None, rows, size(mask, -1)]
            expanded = builder.node("Expand", mask, target, like=mask, shape=shape)
            done[key] = expanded
        node.replace_input_with(3, done[key])


def float_masks(model: ir.Model) -> None:
    """Give every Attention a float attn_mask: zeros where there is none, the lowest number where a boolean says no.

    This is what the fallback below opset 23 needs, where Attention is spelled out in MatMul, Add and Softmax.
    """
    for node in [n for n in model.graph.all_nodes() if is_op(n, "Attention")]:
        q, k = node.inputs[0], node.inputs[1]
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is not None and mask.dtype != ir.DataType.BOOL:
            continue
        builder = Builder(node)
        zero = number_like(builder, 0.0, q)
        if mask is None:
            new = builder.node("Expand", zero, builder.concat([1], builder.axes(k, 2, 3)), like=q, shape=[1, None])
        else:
            lowest = number_like(builder, _LOWEST[q.dtype or ir.DataType.FLOAT], q)
            new = builder.node("Where", mask, zero, lowest, like=q, shape=mask.shape)
        node.resize_inputs(max(4, len(node.inputs)))
        node.replace_input_with(3, new)
