"""What the rules share: constants, ranks and sizes of values, building nodes beside others."""

import numpy as np
import onnx_ir as ir

from qexport.ops import DOMAIN

_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Where", "Softmax", "Cast", "Identity", "Dropout", "Not", "Pow", "MatMul"}
# Ops of onnxruntime, unknown to onnx's shape inference, whose first output has the shape of the first input.
RUNTIME_SAME_SHAPE = {
    "BiasGelu",
    "FastGelu",
    "Gelu",
    "QuickGelu",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}
# Ops that scales are computed with in exported files; evaluated only on a few constant numbers.
_FOLDABLE = {
    "Add",
    "Cast",
    "Concat",
    "Div",
    "Gather",
    "Identity",
    "Mul",
    "Neg",
    "Pow",
    "Reciprocal",
    "Reshape",
    "Shape",
    "Slice",
    "Sqrt",
    "Squeeze",
    "Sub",
    "Unsqueeze",
}


def constant(value: ir.Value | None, limit: int = 4096, depth: int = 16) -> np.ndarray | None:
    """The value as an array when it is a constant of at most `limit` elements, or computed from such; else None."""
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    node = value.producer()
    if tensor is None and is_op(node, "Constant"):
        tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.numpy() if tensor.size <= limit else None
    if node is None or depth == 0 or not is_op(node, *_FOLDABLE) or len(node.outputs) != 1:
        return None
    if node.op_type == "Shape":
        return _constant_shape(node)
    inputs = [constant(x, limit, depth - 1) if x is not None else None for x in node.inputs]
    if any(array is None for array, x in zip(inputs, node.inputs, strict=True) if x is not None):
        return None
    return _evaluate(node, inputs)


def _constant_shape(node: ir.Node) -> np.ndarray | None:
    shape = node.inputs[0].shape
    if shape is None:
        return None
    from qexport.rewrite.sizes import known_size

    axes = range(len(shape))[attribute(node, "start", 0) : attribute(node, "end", len(shape))]
    # an axis of unknown size stands as -1; nothing is computed from it (see `_evaluate`)
    sizes = [known_size(node.inputs[0], axis) for axis in axes]
    return np.array([-1 if d is None else d for d in sizes], np.int64)


def _evaluate(node: ir.Node, inputs: list) -> np.ndarray | None:
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    if any(array is not None and array.dtype.kind in "iu" and (array == -1).any() for array in inputs[:1]) and (
        node.op_type not in ("Gather", "Slice", "Squeeze", "Unsqueeze", "Concat", "Identity", "Reshape")
    ):
        return None  # arithmetic on a size that is not known
    proto = ir.to_proto(node)
    names = [x.name for x in node.inputs if x is not None]
    graph = helper.make_graph(
        [proto],
        "fold",
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in dict.fromkeys(names)],
        [helper.make_tensor_value_info(node.outputs[0].name, TensorProto.UNDEFINED, None)],
    )
    opset = node.graph.opset_imports.get("", 23) if isinstance(node.graph, ir.Graph) else 23
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    feeds = {x.name: array for x, array in zip(node.inputs, inputs, strict=True) if x is not None}
    try:
        return np.asarray(ReferenceEvaluator(model).run(None, feeds)[0])
    except Exception:  # an odd or malformed node is simply not a constant
        return None


def scalar(value: ir.Value | None) -> float | None:
    """The value as a float when it is a constant of one element, else None."""
    array = constant(value)
    if array is None or array.size != 1:
        return None
    return float(array.reshape(-1)[0])


def is_single(value: ir.Value | None) -> bool:
    """Whether the value is known to hold one element, constant or not."""
    return value is not None and value.shape is not None and all(dim == 1 for dim in value.shape)


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
    if node.op_type in RUNTIME_SAME_SHAPE:
        return rank(node.inputs[0], depth - 1)
    if node.op_type == "EmbedLayerNormalization":
        return 1 if value is node.outputs[1] else 3
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


def attribute(node: ir.Node, name: str, default=None):
    """The value of an attribute of a node, `default` when it has none."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Whether a node is one of these ops of a domain ("" is ai.onnx)."""
    return node is not None and node.op_type in op_types and (node.domain or "").replace("ai.onnx", "") == domain


def consumers(value: ir.Value, ignore: str = "Shape") -> list[ir.Node]:
    """The nodes that use a value, without those that only ask for its shape; each once."""
    return list({id(use.node): use.node for use in value.uses() if not is_op(use.node, ignore)}.values())


class Builder:
    """Adds nodes right before an anchor node, with names derived from it that are unique in the model."""

    def __init__(self, anchor: ir.Node, stem: str | None = None):
        self.anchor = anchor
        self.stem = stem or anchor.outputs[0].name or "attention"
        self.count = 0
        self.module = anchor.metadata_props.get("qexport.module")

    def node(
        self, op_type: str, *inputs, like: ir.Value | None = None, shape=None, dtype=None, domain: str = "", **attributes
    ) -> ir.Value:
        """The output of a new node.

        Args:
            inputs: values, None for one that is left out, or integers, which become int64 constants.
            domain: of the op, ai.onnx when blank.
            like: a value with the element type of the output; `dtype` gives the type itself.
            shape: sizes, names or None per axis of the output, where known.
        """
        values = [x if isinstance(x, ir.Value) or x is None else self.const(np.asarray(x, np.int64)) for x in inputs]
        name = self._name(op_type)
        dtype = dtype if dtype is not None else like.dtype if like is not None else None
        result = ir.Value(name=name, type=ir.TensorType(dtype) if dtype is not None else None)
        if shape is not None:
            result.shape = ir.Shape(shape)
        node = ir.Node(
            domain, op_type, values, ir.convenience.convert_attributes(attributes), outputs=[result], name=f"{name}_node"
        )
        return self._add(node)

    def several(self, op_type: str, *inputs: ir.Value, dtypes, shapes=None, domain: str = "") -> tuple[ir.Value, ...]:
        """The outputs of a new node that has several, of these types and, where given, shapes."""
        shapes = shapes or [None] * len(dtypes)
        results = [
            ir.Value(name=self._name(op_type), type=ir.TensorType(dtype), shape=None if shape is None else ir.Shape(shape))
            for dtype, shape in zip(dtypes, shapes, strict=True)
        ]
        self._add(ir.Node(domain, op_type, inputs, outputs=results, name=f"{results[0].name}_node"))
        return tuple(results)

    def ours(self, op_name: str, *inputs: ir.Value | None, like: ir.Value, **attributes) -> ir.Value:
        """The first output, with type and shape of `like`, of a node of the domain com.qexport as the op table writes it."""
        from qexport.ops.proto import make_node

        proto = make_node(op_name, ["x" if value is not None else "" for value in inputs], ["y"], **attributes)
        name = self._name(op_name)
        node = ir.Node(
            DOMAIN,
            op_name,
            inputs,
            [ir.serde.deserialize_attribute(a) for a in proto.attribute],
            outputs=[ir.Value(name=name, type=like.type, shape=like.shape)],
            name=f"{name}_node",
            metadata_props={entry.key: entry.value for entry in proto.metadata_props},
        )
        return self._add(node)

    def const(self, array: np.ndarray) -> ir.Value:
        """A constant as the output of a Constant node."""
        name = self._name("const")
        tensor = ir.tensor(np.asarray(array), name=name)
        result = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        return self._add(
            ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[result], name=f"{name}_node")
        )

    def transpose(self, value: ir.Value, perm: list[int]) -> ir.Value:
        """`value` with its axes permuted; merged with a Transpose that made it, and left out where nothing moves."""
        producer = value.producer()
        if is_op(producer, "Transpose") and "perm" in producer.attributes:
            inner = producer.attributes["perm"].as_ints()
            value, perm = producer.inputs[0], [inner[p] for p in perm]
        if perm == list(range(len(perm))):
            return value
        shape = [value.shape[p] for p in perm] if value.shape is not None else [None] * len(perm)
        return self.node("Transpose", value, like=value, shape=shape, perm=perm)

    def axes(self, value: ir.Value, start: int, end: int) -> ir.Value:
        """Sizes of the axes start..end of a value, as an int64 vector."""
        return self.node("Shape", value, dtype=ir.DataType.INT64, shape=[end - start], start=start, end=end)

    def concat(self, *parts) -> ir.Value:
        """Vectors and integers joined into one int64 vector."""
        return self.node("Concat", *([p] if isinstance(p, int) else p for p in parts), dtype=ir.DataType.INT64, axis=0)

    def _name(self, what: str) -> str:
        self.count += 1
        return f"{self.stem}/qexport_{what}_{self.count}"

    def _add(self, node: ir.Node) -> ir.Value:
        if self.module:
            node.metadata_props["qexport.module"] = self.module
        self.anchor.graph.insert_before(self.anchor, node)
        return node.outputs[0]
