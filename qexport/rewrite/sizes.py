"""Sizes of axes that shape inference leaves open: followed back through the nodes that keep, move, split or join axes."""

import onnx_ir as ir

from qexport.rewrite.graph import RUNTIME_SAME_SHAPE, attribute, constant, is_op, rank, size

_CACHE = "qexport.sizes"
_SAME_SHAPE = ("Cast", "Identity", "Dropout", "Softmax", "Neg", "Sigmoid", "Tanh", "LayerNormalization")
_BROADCAST = ("Add", "Sub", "Mul", "Div", "Where", "Pow")


def known_size(value: ir.Value | None, axis: int) -> int | None:
    """Size of one axis when it is a number, by the shape or by the nodes before the value; None when unknown."""
    found = size(value, axis)
    if isinstance(found, int):
        return found
    axes = rank(value)
    if value is None or value.producer() is None or axes is None or not -axes <= axis < axes:
        return None
    axis = axis % axes
    cache = value.meta.setdefault(_CACHE, {})
    if axis not in cache:
        cache[axis] = None  # while it is looked for
        cache[axis] = _from_producer(value, axis, axes)
    return cache[axis]


def _from_producer(value: ir.Value, axis: int, axes: int) -> int | None:
    node = value.producer()
    source = node.inputs[0] if node.inputs else None
    if is_op(node, *_SAME_SHAPE) or node.op_type in RUNTIME_SAME_SHAPE:
        return known_size(source, axis)
    if is_op(node, "Transpose") and "perm" in node.attributes:
        return known_size(source, node.attributes["perm"].as_ints()[axis])
    if is_op(node, *_BROADCAST):
        operands = [x for x in node.inputs if x is not None and rank(x) == axes]
        sizes = [d for x in operands if (d := known_size(x, axis)) is not None]
        # an axis of 1 may be broadcast by one whose size is not known
        return max((d for d in sizes if d > 1), default=None)
    if is_op(node, "Reshape"):
        return _target_size(node.inputs[1], axis) or _remaining_size(node, axis, axes)
    if is_op(node, "Expand"):
        return _target_size(node.inputs[1], axis) if rank(source) == axes else None
    if is_op(node, "Concat"):
        sizes = [known_size(x, axis) for x in node.inputs]
        if attribute(node, "axis") % axes == axis:
            return sum(sizes) if None not in sizes else None
        return next((d for d in sizes if d is not None), None)
    if is_op(node, "Slice"):
        return known_size(source, axis) if axis not in _axes(node, 3, axes) else None
    if is_op(node, "Split"):
        return known_size(source, axis) if attribute(node, "axis", 0) % axes != axis else None
    if is_op(node, "Unsqueeze", "Squeeze"):
        return _through_ones(node, axis, axes)
    if node.op_type == "EmbedLayerNormalization" and axis == 2:
        return size(node.inputs[2], 1)
    if is_op(node, "MatMul") and axis == axes - 1:
        return known_size(node.inputs[1], -1)
    if is_op(node, "Gather") and rank(node.inputs[1]) == 0:
        dropped = attribute(node, "axis", 0) % (axes + 1)
        return known_size(source, axis if axis < dropped else axis + 1)
    return None


def _axes(node: ir.Node, index: int, axes: int) -> set[int]:
    """The axes that a Slice cuts; all of them when they are not constant."""
    value = node.inputs[index] if len(node.inputs) > index else None
    found = constant(value) if value is not None else None
    return {int(a) % axes for a in found.reshape(-1)} if found is not None else set(range(axes))


def _through_ones(node: ir.Node, axis: int, axes: int) -> int | None:
    """An axis behind Unsqueeze or Squeeze with constant axes."""
    moved = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if moved is None:
        return None
    longer = axes if node.op_type == "Unsqueeze" else axes + moved.size
    ones = {int(a) % longer for a in moved.reshape(-1)}
    kept = [a for a in range(longer) if a not in ones]
    if node.op_type == "Squeeze":
        return known_size(node.inputs[0], kept[axis])
    return 1 if axis in ones else known_size(node.inputs[0], kept.index(axis))


def _target_size(target: ir.Value, axis: int) -> int | None:
    """The size that a target of Reshape or Expand, or the Concat that makes it, gives an axis as a positive number."""
    array = constant(target)
    if array is None:
        part = target.producer()
        if not is_op(part, "Concat") or len(part.inputs) <= axis or any(size(x, 0) != 1 for x in part.inputs):
            return None
        array, axis = constant(part.inputs[axis]), 0
    return int(array.reshape(-1)[axis]) if array is not None and array.size > axis and array.reshape(-1)[axis] > 0 else None


def _remaining_size(node: ir.Node, axis: int, axes: int) -> int | None:
    """The -1 of a Reshape that splits the last axis in two, (.., width) -> (.., -1, size): width / size."""
    if axis != axes - 2 or rank(node.inputs[0]) != axes - 1:
        return None
    width, each = known_size(node.inputs[0], -1), _target_size(node.inputs[1], axes - 1)
    return width // each if width and each and width % each == 0 else None
