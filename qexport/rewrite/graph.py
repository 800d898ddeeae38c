"""Nodes: what they are, who uses their values, and new ones beside others."""

import numpy as np
import onnx_ir as ir

from qexport.ops import DOMAIN


def attribute(node: ir.Node, name: str, default=None):
    """The value of an attribute of a node, `default` when it has none."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    """Whether a node is one of these ops of a domain ("" is ai.onnx)."""
    return node is not None and node.op_type in op_types and (node.domain or "").replace("ai.onnx", "") == domain


def consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that use a value, without those that only ask for its shape; each once."""
    return list({id(use.node): use.node for use in value.uses() if not is_op(use.node, "Shape")}.values())


def shown(node: ir.Node) -> str:
    """A node as messages name it: by its own name, or by that of its output where it has none."""
    return repr(node.name or node.outputs[0].name)


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
