"""fuse_packed_attention: com.microsoft Attention, which projects by itself, becomes MatMul, Add and ai.onnx Attention.

Attention(x, W, b, mask)  ->  Attention(split(x W + b), mask)
"""

import onnx_ir as ir

from qexport.rewrite import DeclinedError
from qexport.rewrite.fuse_multi_head_attention import emit, split, split_last
from qexport.rewrite.graph import Builder, attribute
from qexport.rewrite.runtime_masks import runtime_mask
from qexport.rewrite.values import known_size, rank, size

OP_TYPE = "Attention"


def fuse(node: ir.Node, opset: int) -> None:
    """Replace one com.microsoft Attention.

    Raises:
        DeclinedError: it uses a feature that ai.onnx Attention lacks; the text names it.
    """
    x, weights, bias, padding, past, added = [*node.inputs, *[None] * 6][:6]
    heads = attribute(node, "num_heads")
    causal = attribute(node, "unidirectional", 0)
    if past is not None or any(i is not None for i in node.inputs[6:]):
        raise DeclinedError("its past keys and values are packed in one tensor")
    if attribute(node, "do_rotary", 0):
        raise DeclinedError("it applies rotary embeddings by itself")
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        raise DeclinedError("its present keys and values are packed in one output that is used")
    if causal and opset < 23:
        raise DeclinedError("it is causal, which the fallback below opset 23 cannot express")
    total = known_size(weights, 1) or known_size(bias, 0)
    widths = list(attribute(node, "qkv_hidden_sizes", ())) or ([total // 3] * 3 if total else None)
    if widths is None or sum(widths) != total:
        raise DeclinedError("the widths of its queries, keys and values are unknown")
    builder = Builder(node)
    projected = builder.node("MatMul", x, weights, like=x, shape=[size(x, 0), size(x, 1), total])
    if bias is not None:
        projected = builder.node("Add", projected, bias, like=x, shape=projected.shape)
    q, k, v = split(builder, projected, widths, axis=2)
    if opset < 23:
        q, k, v = (split_last(builder, part, heads) for part in (q, k, v))
    if padding is not None and rank(padding) == 4:
        raise DeclinedError("its mask has the four axes of a fixed maximum length")
    mask = runtime_mask(builder, padding, added, attribute(node, "mask_filter_value", -1e4), k, None)
    emit(builder, node, q, k, v, mask, {}, heads, causal, opset)
