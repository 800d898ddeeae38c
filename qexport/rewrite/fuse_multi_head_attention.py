"""fuse_multi_head_attention: com.microsoft MultiHeadAttention becomes ai.onnx Attention.

    MultiHeadAttention(query, key, value, bias, key_padding_mask, attention_bias, past_key, past_value)
    -> Attention(query + bias_q, key + bias_k, value + bias_v, mask, past_key, past_value)

From opset 23 on the inputs stay (batch, length, heads * head_size) where they are so; below, they are split into heads.
"""

import onnx_ir as ir

from qexport.rewrite import DeclinedError
from qexport.rewrite.graph import Builder, attribute
from qexport.rewrite.runtime_masks import runtime_mask
from qexport.rewrite.values import known_size, rank, size

OP_TYPE = "MultiHeadAttention"
INPUTS = ("query", "key", "value", "bias", "key_padding_mask", "attention_bias", "past_key", "past_value")


def fuse(node: ir.Node, opset: int) -> None:
    """Replace one MultiHeadAttention.

    Raises:
        DeclinedError: it uses a feature that Attention lacks; the text names it.
    """
    given = dict(zip(INPUTS, node.inputs, strict=False))
    heads = attribute(node, "num_heads")
    if any(x is not None for x in node.inputs[len(INPUTS) :]):
        raise DeclinedError("it works on a shared key and value buffer (past_sequence_length, cache_indirection)")
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        raise DeclinedError("its scores are an output that is used")
    past = given.get("past_key")
    causal = attribute(node, "unidirectional", 0)
    if past is not None and (causal or opset < 23):
        raise DeclinedError("it is causal with past keys" if causal else "it has past keys, which opset 23 is needed for")
    if causal and opset < 23:
        raise DeclinedError("it is causal, which the fallback below opset 23 cannot express")
    builder = Builder(node)
    q, k, v = _projections(builder, given)
    if opset < 23 or len({rank(x) for x in (q, k, v)}) > 1:
        q, k, v = (split_last(builder, x, heads) for x in (q, k, v))
    filler = attribute(node, "mask_filter_value", -1e4)
    mask = runtime_mask(builder, given.get("key_padding_mask"), given.get("attention_bias"), filler, k, past)
    emit(builder, node, q, k, v, mask, given, heads, causal, opset)


def _projections(builder: Builder, given: dict) -> list[ir.Value]:
    """Q, K and V with their biases added; each (batch, length, heads * size) or (batch, heads, length, size)."""
    q, k, v, bias = (given.get(name) for name in ("query", "key", "value", "bias"))
    if rank(q) is None:
        raise DeclinedError("the number of axes of its query is unknown")
    if k is None:
        if rank(q) != 5:
            raise DeclinedError("it has a query alone that is not packed with keys and values")
        parts = [builder.node("Gather", q, builder.const(_index(i)), like=q, shape=[None] * 4, axis=3) for i in range(3)]
        return [builder.transpose(part, [0, 2, 1, 3]) for part in parts]
    if v is None:
        raise DeclinedError("its keys and values are packed in one tensor")
    if bias is not None:
        widths = [known_size(x, -1) for x in (q, k, v)]
        if any(rank(x) != 3 for x in (q, k, v)) or None in widths:
            raise DeclinedError("its bias cannot be split: a width is unknown")
        parts = split(builder, bias, widths, axis=0)
        q, k, v = (builder.node("Add", x, b, like=x, shape=x.shape) for x, b in zip((q, k, v), parts, strict=True))
    return [q, k, v]


def _index(i: int):
    import numpy as np

    return np.asarray(i, np.int64)


def split(builder: Builder, value: ir.Value, widths: list[int], axis: int) -> list[ir.Value]:
    """A value cut along an axis into parts of these widths."""
    parts, start, n = [], 0, rank(value) or 1
    for width in widths:
        shape = list(value.shape) if value.shape is not None else [None] * n
        shape[axis] = width
        parts.append(builder.node("Slice", value, [start], [start + width], [axis], like=value, shape=shape))
        start += width
    return parts


def split_last(builder: Builder, value: ir.Value, heads: int) -> ir.Value:
    """(batch, length, heads * size) -> (batch, heads, length, size); 4-D values pass."""
    if rank(value) == 4:
        return value
    width = known_size(value, 2)
    each = width // heads if width else None
    shape = [size(value, 0), size(value, 1), heads, each]
    opened = builder.node("Reshape", value, [0, 0, heads, -1], like=value, shape=shape)
    return builder.transpose(opened, [0, 2, 1, 3])


def emit(builder: Builder, node: ir.Node, q, k, v, mask, given: dict, heads: int, causal: int, opset: int) -> None:
    """Put an Attention in the place of a com.microsoft node whose output is (batch, length, heads * size)."""
    past = [given.get("past_key"), given.get("past_value")]
    inputs = [q, k, v, mask, *past]
    while inputs and inputs[-1] is None:
        inputs.pop()
    values = {"is_causal": int(causal)} | ({"q_num_heads": heads, "kv_num_heads": heads} if rank(q) == 3 else {})
    scale = attribute(node, "scale", 0.0) or None
    if scale is None and opset < 23:  # the fallback needs it on the node
        width = known_size(q, 3)
        if width is None:
            raise DeclinedError("its head size is unknown, and with it the scale")
        scale = width**-0.5
    if scale is not None:
        values["scale"] = float(scale)
    olds = list(node.outputs[:3])
    while len(olds) > 1 and not olds[-1].uses() and not olds[-1].is_graph_output():
        olds.pop()
    outputs = [ir.Value(type=old.type, shape=old.shape) for old in olds]
    new = ir.Node("", "Attention", inputs, ir.convenience.convert_attributes(values), outputs=outputs, name=node.name)
    new.metadata_props.update(node.metadata_props)
    node.graph.insert_before(node, new)
    results = list(outputs)
    if rank(q) == 4:
        outputs[0].shape = ir.Shape([size(q, 0), heads, size(q, 2), known_size(v, 3)])
        closed = builder.transpose(outputs[0], [0, 2, 1, 3])
        results[0] = builder.node("Reshape", closed, [0, 0, -1], like=outputs[0])
        outputs[0].name = f"{olds[0].name}/qexport_attention"
    for old, result in zip(olds, results, strict=True):
        name = old.name
        old.replace_all_uses_with(result, replace_graph_outputs=True)
        old.name = f"{name}/qexport_replaced"
        result.name, result.type = name, old.type
        result.shape = old.shape if result.shape is None else result.shape
    node.graph.remove(node, safe=True)
