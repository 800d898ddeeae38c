"""convert_opset: bring a graph to another ai.onnx opset with onnx's own version converter.

The large weights stay out of the conversion (a protobuf holds 2 GiB at most) and are put back afterwards.
"""

import onnx
import onnx_ir as ir

from qexport.errors import QexportError
from qexport.rewrite.graph import attribute, is_op
from qexport.rewrite.values import known_size, rank
from qexport.sources.quiet import reason_of

_SOFTMAX_AXIS = 13  # the opset from which on Softmax runs over one axis
_ASIDE = "qexport.aside"
_KEPT = 1024  # bytes; small tensors stay, since adapters read axes, scales and pads from them


def convert_opset(model: ir.Model, opset: int, name: str) -> ir.Model:
    """`model` at the ai.onnx opset `opset`; itself when it is there already.

    Args:
        name: of the model, for messages.

    Raises:
        QexportError: the converter has no adapter for one of its ops; on the way down that is common.
    """
    present = model.opset_imports.get("", 1)
    if present == opset:
        return model
    metadata = {node.outputs[0].name: dict(node.metadata_props) for node in model.graph.all_nodes() if node.metadata_props}
    kept = {}
    for key, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _KEPT and not value.is_graph_input():
            kept[key] = tensor
            value.const_value = None
            value.shape = ir.Shape(tensor.shape)
            value.dtype = tensor.dtype
            del model.graph.initializers[key]
            model.graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):  # a proto would keep the file's name but forget its folder
            value.const_value = ir.tensor(tensor.numpy().copy(), name=key)
    strangers = _set_aside(model, present, opset)
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(model), opset)
    except Exception as error:  # the converter is C++ and raises RuntimeError, InferenceError and others
        if present > opset:
            raise QexportError(
                f"{name}: cannot be lowered from opset {present} to {opset}; choose opset {present}"
            ) from error
        raise QexportError(f"{name}: onnx cannot raise it from opset {present} to {opset}: {reason_of(error)}") from error
    raised = ir.from_proto(proto)
    for node in raised.graph.all_nodes():  # the converter drops it
        node.metadata_props.update(metadata.get(node.outputs[0].name, {}))
    if strangers:
        for node in raised.graph.all_nodes():
            node.domain = "" if node.domain == _ASIDE else node.domain
        raised.opset_imports.pop(_ASIDE, None)
    if opset < 18 <= present:
        # the converter turns the axes back into an attribute but forgets this one, which came with the input
        for node in raised.graph.all_nodes():
            if node.domain == "" and node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
                node.attributes.pop("noop_with_empty_axes", None)
    for value in list(raised.graph.inputs):
        if value.name in kept:
            raised.graph.inputs.remove(value)
            value.const_value = kept[value.name]
            raised.graph.register_initializer(value)
    return raised


def _set_aside(model: ir.Model, present: int, opset: int) -> bool:
    """Move nodes that the converter must not touch to a domain that it passes over; whether there are any.

    * onnxruntime's optimizer writes LayerNormalization and its kin into ai.onnx whatever the opset.
    * Before opset 13 Softmax ran over all axes from `axis` on. Over the last one alone it means the same in both, but where
      the converter does not see how many axes there are it adds Flatten and Reshape.
    * It has no adapters for Split and Pad from opset 18 down, where most of them need none.
    """
    strangers = [n for n in model.graph.all_nodes() if n.domain == "" and not onnx.defs.has(n.op_type, present, "")]
    if present < _SOFTMAX_AXIS <= opset:
        for node in model.graph.all_nodes():
            axis = attribute(node, "axis", 1)
            if is_op(node, "Softmax", "LogSoftmax") and (axis == -1 or axis + 1 == rank(node.inputs[0])):
                node.attributes["axis"] = ir.AttrInt64("axis", -1)
                strangers.append(node)
    if opset < 18 <= present:
        strangers += [node for node in model.graph.all_nodes() if _is_older(node)]
    for node in strangers:
        node.domain = _ASIDE
    if strangers:
        model.opset_imports[_ASIDE] = 1
    return bool(strangers)


def _is_older(node: ir.Node) -> bool:
    """Whether a Split or Pad of opset 18 means the same in opset 17; the number of outputs, implied there, is dropped."""
    if is_op(node, "Pad"):
        return len(node.inputs) < 4 or node.inputs[3] is None
    if not is_op(node, "Split"):
        return False
    parts = attribute(node, "num_outputs")
    if parts is None:
        return True
    length = known_size(node.inputs[0], attribute(node, "axis", 0))
    if length is None or length % parts:
        return False  # unequal parts, which opset 17 does not make by itself
    del node.attributes["num_outputs"]
    return True
