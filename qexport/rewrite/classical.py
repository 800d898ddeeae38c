"""The way to the classical form: fuse attention into ai.onnx Attention nodes and give them masks that runtimes take."""

import onnx_ir as ir
import onnx_ir.passes.common as passes

from qexport.rewrite import DeclinedError, LeftAlone, fuse_multi_head_attention, fuse_packed_attention
from qexport.rewrite.fuse_attention import fuse_attention
from qexport.rewrite.fuse_softmax import fuse_softmax
from qexport.rewrite.masks import expand_masks, float_masks
from qexport.rewrite.restore_attention import restore_attention
from qexport.rewrite.sites import module_of
from qexport.rewrite.ungroup_attention import ungroup_attention

RUNTIME_DOMAIN = "com.microsoft"
RUNTIME_RULES = {rule.OP_TYPE: rule.fuse for rule in (fuse_multi_head_attention, fuse_packed_attention)}
_SHARED_BUFFER = "it appends to a shared buffer of keys and values; convert what it was exported from, with --kv-cache N"
# Attention ops of onnxruntime that no rule takes.
RUNTIME_REASONS = {
    "GroupQueryAttention": _SHARED_BUFFER,
    "DecoderMaskedMultiHeadAttention": _SHARED_BUFFER,
    "DecoderMaskedSelfAttention": _SHARED_BUFFER,
    "DecoderAttention": "it projects and caches by itself",
    "PackedAttention": "its batch is packed without padding",
    "PackedMultiHeadAttention": "its batch is packed without padding",
    "PagedAttention": "its keys and values are paged",
    "SparseAttention": "it is sparse already",
    "LongformerAttention": "it is sparse already",
    "QAttention": "it computes in quantised arithmetic; give the float model",
    "QOrderedAttention": "it computes in quantised arithmetic; give the float model",
    "LinearAttention": "it has no softmax over the keys",
}


def to_classical(model: ir.Model, opset: int) -> list[LeftAlone]:
    """Bring `model` in place to the form in which every attention is one ai.onnx Attention node.

    Args:
        opset: of the model; below 23 the nodes hold only what the spelled-out fallback of QuantumAttention can express,
            and must be replaced before the model is written.

    Returns:
        The attention-like sites that no rule could take, with the reason.
    """
    restore_attention(model)
    left_alone = fuse_runtime_ops(model, opset) + fuse_softmax(model) + fuse_attention(model, opset)
    ungroup_attention(model)
    if opset >= 23:
        expand_masks(model)
    else:
        float_masks(model)
    tidy(model)
    return left_alone


def fuse_runtime_ops(model: ir.Model, opset: int) -> list[LeftAlone]:
    """Replace the attention ops of com.microsoft in place; those that stay, with the reason."""
    left_alone = []
    for node in list(model.graph.all_nodes()):
        if node.domain != RUNTIME_DOMAIN or node.op_type not in (*RUNTIME_RULES, *RUNTIME_REASONS):
            continue
        try:
            if node.op_type in RUNTIME_REASONS:
                raise DeclinedError(f"{node.op_type}: {RUNTIME_REASONS[node.op_type]}")
            RUNTIME_RULES[node.op_type](node, opset)
        except DeclinedError as reason:
            left_alone.append(LeftAlone(node.name or node.outputs[0].name or node.op_type, module_of(node), str(reason)))
    return left_alone


def tidy(model: ir.Model) -> None:
    """Remove what nothing uses any more, bring the nodes in order and make names unique."""
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    passes.NameFixPass()(model)
