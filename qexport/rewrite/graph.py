"""What the rules share: constants, ranks and sizes of values, building nodes beside others."""

import numpy as np
import onnx_ir as ir

_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Where", "Softmax", "Cast", "Identity", "Dropout", "Not", "Pow", "MatMul"}


def constant(value: ir.Value | None, limit: int = 4096) -> np.ndarray | None:
    """The value as an array when it is a constant of at most `limit` elements, else None."""
    if value is None:
        return None
    tensor = value.const_value
    producer = value.producer()
    if tensor is None and producer is not None and producer.op_type == "Constant" and producer.domain in ("", "ai.onnx"):
        tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or value.is_graph_input() or tensor.size > limit:
        return None
    return tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The value as a float when it is a constant of one element, else None."""
    array = constant(value, limit=1)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def rank(value: ir.Value | None, depth: int = 12) -> int | None:
    """Number of axes, from the shape or from the nodes before it; None when unknown."""
    if value is None:
        return None
    if value.shape is not None:
        return len(value.shape)
    if value.const_value is not None:
        return len(value.const_value.shape)
    node = value.producer()
    if node is None or depth == 0:
        return None
    if node.op_type == "Transpose" and "perm" in node.attributes:
        return len(node.attributes["perm"].as_ints())
    if node.op_type == "Reshape" and node.inputs[1] is not None:
        target = constant(node.inputs[1])
        if target is not None:
            return target.size
        shape, source = node.inputs[1].shape, node.inputs[1].producer()
        if shape is not None and isinstance(shape[0], int):
            return shape[0]
        return len(source.inputs) if source is not None and source.op_type == "Concat" else None
    if node.op_type in _ELEMENTWISE:
        ranks = [r for x in node.inputs if (r := rank(x, depth - 1)) is not None]
        return max(ranks, default=None)
    return None


def size(value: ir.Value | None, axis: int) -> int | str | None:
    """Size of one axis: a number, the name of a dynamic axis, or None when unknown."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else dim.value


def known_size(value: ir.Value | None, axis: int) -> int | None:
    """Size of one axis when it is a number."""
    found = size(value, axis)
    return found if isinstance(found, int) else None


def attribute(node: ir.Node, name: str, default=None):
    """The value of an attribute of a node, `default` when it has none."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Whether a node is one of these ops of a domain ("" is ai.onnx)."""
    return node is not None and node.op_type in op_types and (node.domain or "").replace("ai.onnx", "") == domain


def only_use(value: ir.Value) -> ir.Node | None:
    """The only consumer of a value, None when it has several, none, or is a graph output."""
    uses = value.uses()
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


class Builder:
    """Adds nodes right before an anchor node, with names derived from it that are unique in the model."""

    def __init__(self, anchor: ir.Node, stem: str | None = None):
        self.anchor = anchor
        self.stem = stem or anchor.outputs[0].name or "attention"
        self.count = 0

    def node(self, op_type: str, *inputs, dtype=None, rank=None, output: str | None = None, **attributes) -> ir.Value:
        """The output of a new node; plain numbers and lists among the inputs become constants (int64)."""
        values = [x if isinstance(x, ir.Value) or x is None else self.const(np.asarray(x, np.int64)) for x in inputs]
        self.count += 1
        name = output or f"{self.stem}/qexport_{op_type}_{self.count}"
        result = ir.Value(name=name, type=ir.TensorType(dtype) if dtype is not None else None)
        if rank is not None:
            result.shape = ir.Shape([None] * rank)
        node = ir.Node(
            "", op_type, values, ir.convenience.convert_attributes(attributes), outputs=[result], name=f"{name}_node"
        )
        self.anchor.graph.insert_before(self.anchor, node)
        return result

    def const(self, array: np.ndarray) -> ir.Value:
        """A constant as the output of a Constant node."""
        self.count += 1
        name = f"{self.stem}/qexport_const_{self.count}"
        tensor = ir.tensor(np.asarray(array), name=name)
        result = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[result], name=f"{name}_node")
        self.anchor.graph.insert_before(self.anchor, node)
        return result
