"""The way to the classical form: fuse attention into ai.onnx Attention nodes and give them masks that runtimes take."""

import onnx_ir as ir
import onnx_ir.passes.common as passes

from qexport.rewrite import LeftAlone
from qexport.rewrite.fuse_attention import fuse_attention
from qexport.rewrite.masks import expand_masks


def to_classical(model: ir.Model, opset: int) -> list[LeftAlone]:
    """Bring `model` in place to the form in which every attention is one ai.onnx Attention node.

    Args:
        opset: of the model; below 23 the nodes hold only what the spelled-out fallback of QuantumAttention can express,
            and must be replaced before the model is written.

    Returns:
        The attention-like sites that no rule could take, with the reason.
    """
    left_alone = fuse_attention(model, opset)
    if opset >= 23:
        expand_masks(model)
    tidy(model)
    return left_alone


def tidy(model: ir.Model) -> None:
    """Remove what nothing uses any more, bring the nodes in order and make names unique."""
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    passes.NameFixPass()(model)
