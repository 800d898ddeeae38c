"""The way to the classical form: raise the opset, name the nodes, fuse attention, and make masks what runtimes take."""

import onnx_ir as ir

from qexport.rewrite import LeftAlone


def to_classical(model: ir.Model, opset: int) -> list[LeftAlone]:
    """Bring `model` in place to the form in which every attention is one ai.onnx Attention node.

    Returns:
        The attention-like sites that no rule could take, with the reason.
    """
    return []
