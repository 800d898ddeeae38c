"""ungroup_attention: Attention reads the key and value heads before they were repeated for groups of query heads.

Attention(Q, repeat(K), repeat(V))  ->  Attention(Q, K, V)
"""

import onnx_ir as ir

from qexport.rewrite.graph import attribute, is_op
from qexport.rewrite.values import constant, known_size, rank


def ungroup_attention(model: ir.Model) -> None:
    """Let Attention nodes with heads of their own axis read the key and value heads before these were repeated."""
    for node in [n for n in model.graph.all_nodes() if is_op(n, "Attention") and not attribute(n, "q_num_heads")]:
        if any(x is not None for x in node.inputs[4:6]):
            continue  # past heads are as many as the repeated ones
        for index, value in zip((1, 2), ungrouped(*node.inputs[:3]), strict=True):
            node.replace_input_with(index, value)


def ungrouped(q: ir.Value, k: ir.Value, v: ir.Value) -> tuple[ir.Value, ir.Value]:
    """K and V before they were repeated for groups of query heads (Unsqueeze, Expand, Reshape), where that is certain."""
    pairs = [_before_repeat(x) for x in (k, v)]
    if None in pairs or known_size(pairs[0], 1) != known_size(pairs[1], 1):
        return k, v
    q_heads, kv_heads = known_size(q, 1) or known_size(k, 1), known_size(pairs[0], 1)
    return tuple(pairs) if q_heads and kv_heads and q_heads % kv_heads == 0 else (k, v)


def _before_repeat(value: ir.Value) -> ir.Value | None:
    reshape = value.producer()
    expand = reshape.inputs[0].producer() if is_op(reshape, "Reshape") else None
    unsqueeze = expand.inputs[0].producer() if is_op(expand, "Expand") else None
    if not is_op(unsqueeze, "Unsqueeze") or rank(unsqueeze.inputs[0]) != 4:
        return None
    axes = constant(unsqueeze.inputs[1]) if len(unsqueeze.inputs) > 1 else None
    source = unsqueeze.inputs[0]
    heads, total = known_size(source, 1), known_size(value, 1)
    certain = (
        axes is not None
        and list(axes) == [2]
        and heads is not None
        and total is not None
        and total % heads == 0
        and known_size(value, 3) is not None
        and known_size(value, 3) == known_size(source, 3)
    )
    return source if certain else None
