"""Names of attention sites: of the node and of the torch module it came from."""

import onnx_ir as ir


def site_name(softmax: ir.Node) -> str:
    """A name for the attention around a Softmax: its own name with Softmax read as Attention."""
    name = softmax.name or softmax.outputs[0].name or "softmax"
    head, _, last = name.rpartition("/")
    last = last.replace("Softmax", "Attention").replace("softmax", "attention")
    return f"{head}/{last}" if head else last


def module_from_name(name: str) -> str:
    """The torch module name in a path-like node name of torch's older exporter, "" when it is no path.

    "/encoder/layer.0/attention/self/Softmax" -> "encoder.layer.0.attention.self"
    """
    if not name.startswith("/") or name.count("/") < 2:
        return ""
    return ".".join(name.strip("/").split("/")[:-1])


def module_of(node: ir.Node) -> str:
    """The torch module name of a node, from the exporter's metadata or from a path-like node name."""
    return node.metadata_props.get("qexport.module") or module_from_name(node.name or "")
