"""ungroup_attention: Attention reads the key and value heads before they were repeated for groups of query heads.

    Attention(Q, repeat(K), repeat(V))  ->  Attention(Q, K, V)

Heads are repeated by Unsqueeze, Expand or Tile, and Reshape, before or behind the Transpose that brings them to their axis.
"""

import onnx_ir as ir

from qexport.rewrite.graph import Builder, attribute, is_op
from qexport.rewrite.values import constant, known_size, rank


def ungroup_attention(model: ir.Model) -> None:
    """Let Attention nodes with heads of their own axis read the key and value heads before these were repeated."""
    for node in [n for n in model.graph.all_nodes() if is_op(n, "Attention") and not attribute(n, "q_num_heads")]:
        if any(x is not None for x in node.inputs[4:6]):
            continue  # past heads are as many as the repeated ones
        for index, value in enumerate(ungrouped(Builder(node), *node.inputs[:3]), 1):
            node.replace_input_with(index, value)


def ungrouped(builder: Builder, q: ir.Value, k: ir.Value, v: ir.Value) -> tuple[ir.Value, ir.Value]:
    """K and V with the heads that they repeat for those of Q; as they are where that is not certain."""
    found = [_before_repeat(x) for x in (k, v)]
    if None in found:
        return k, v
    (own_k, k_perm), (own_v, v_perm) = found
    kv_heads, q_heads = known_size(own_k, k_perm[1]), known_size(q, 1) or known_size(k, 1)
    if kv_heads != known_size(own_v, v_perm[1]) or not q_heads or q_heads % kv_heads:
        return k, v
    return builder.transpose(own_k, k_perm), builder.transpose(own_v, v_perm)


def _before_repeat(value: ir.Value) -> tuple[ir.Value, list[int]] | None:
    """The heads that a value repeats, with the permutation of their axes; None where that is not certain."""
    node, perm = value.producer(), [0, 1, 2, 3]
    if is_op(node, "Transpose") and "perm" in node.attributes:
        node, perm = node.inputs[0].producer(), list(node.attributes["perm"].as_ints())
    repeat = node.inputs[0].producer() if is_op(node, "Reshape") else None
    unsqueeze = repeat.inputs[0].producer() if is_op(repeat, "Expand", "Tile") else None
    if not is_op(unsqueeze, "Unsqueeze") or rank(unsqueeze.inputs[0]) != 4 or len(perm) != 4 or len(unsqueeze.inputs) < 2:
        return None
    source, heads, axes = unsqueeze.inputs[0], perm[1], constant(unsqueeze.inputs[1])
    own, total, size = known_size(source, heads), known_size(node.outputs[0], heads), known_size(source, 3)
    if own is None or size is None or axes is None or axes.reshape(-1).tolist() != [heads + 1]:
        return None
    if is_op(repeat, "Tile"):
        times = constant(repeat.inputs[1])
        if times is None or times.size != 5 or [*times[: heads + 1], *times[heads + 2 :]] != [1] * 4:
            return None
        repeats = int(times[heads + 1])
    else:
        repeats = known_size(repeat.outputs[0], heads + 1)
    one_batch, all_batches = (known_size(x, perm[0]) == 1 for x in (source, node.outputs[0]))
    if one_batch and not all_batches:  # which Expand repeats, too
        return None
    # not where the key heads are folded into the batch
    certain = repeats is not None and total == own * repeats and size == known_size(node.outputs[0], 3)
    return (source, perm) if certain else None
