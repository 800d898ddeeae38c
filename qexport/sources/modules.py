"""Torch module names of nodes, from what torch's exporters leave in a graph."""

import ast

import onnx_ir as ir

from qexport.rewrite.sites import module_from_name

_PREFIX = "pkg.torch"
_SCOPES = "pkg.torch.onnx.name_scopes"


def name_modules(model: ir.Model) -> None:
    """Give every node `qexport.module`, and drop the exporter's metadata, which holds paths of the machine it ran on.

    torch's exporter writes the modules around a node as metadata; its older one writes them into the node's name.
    """
    for node in model.graph.all_nodes():
        module = _from_scopes(node.metadata_props.get(_SCOPES)) or module_from_name(node.name or "")
        node.doc_string = None
        for owner in (node, *node.outputs):
            _forget(owner.metadata_props)
        if module:
            node.metadata_props["qexport.module"] = module
    for owner in (model, model.graph, *model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        _forget(owner.metadata_props)


def _from_scopes(scopes: str | None) -> str:
    """The innermost module of names such as "['', 'encoder', 'encoder.layer.0', 'linear']", the last of which is the op."""
    try:
        path = ast.literal_eval(scopes) if scopes else []
    except (ValueError, SyntaxError):
        return ""
    return path[-2] if len(path) > 1 and isinstance(path[-2], str) else ""


def _forget(metadata) -> None:
    for key in [key for key in metadata if key.startswith(_PREFIX) or key == "namespace"]:
        del metadata[key]
