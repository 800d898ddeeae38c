"""What is known of values before a model runs: constants, ranks, and sizes of axes, found through the nodes that keep, move,
split or join axes where shape inference leaves them open."""

import numpy as np
import onnx_ir as ir

from qexport.rewrite.graph import attribute, is_op

_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Where", "Softmax", "Cast", "Identity", "Dropout", "Not", "Pow", "MatMul"}
# Ops of onnxruntime, unknown to onnx's shape inference, whose first output has the shape of the first input.
_RUNTIME_SAME_SHAPE = {
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
_INFERRED = "unk__"  # how onnx's shape inference calls axes of which it knows nothing
_CACHE = "qexport.sizes"  # of known_size, in the metadata of a value
_SAME_SHAPE = ("Cast", "Identity", "Dropout", "Softmax", "Neg", "Sigmoid", "Tanh", "LayerNormalization")
_BROADCAST = ("Add", "Sub", "Mul", "Div", "Where", "Pow")


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
    axes = range(len(shape))[attribute(node, "start", 0) : attribute(node, "end", len(shape))]
    # an axis of unknown size stands as -1; nothing is computed from it (see `_evaluate`)
    sizes = [known_size(node.inputs[0], axis) for axis in axes]
    return np.array([-1 if d is None else d for d in sizes], np.int64)


def _evaluate(node: ir.Node, inputs: list) -> np.ndarray | None:
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    if any(array is not None and array.dtype.kind in "iu" and (array == -1).any() for array in inputs) and (
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
    if node.op_type in _RUNTIME_SAME_SHAPE:
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


def many(value: ir.Value, axis: int) -> int | str | None:
    """Size of one axis where it is above 1, or the name that the model gives it; None when it is 1 or unknown."""
    found = known_size(value, axis) or size(value, axis)
    made_up = isinstance(found, str) and found.startswith(_INFERRED)
    return None if found == 1 or made_up else found


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
    if is_op(node, *_SAME_SHAPE) or node.op_type in _RUNTIME_SAME_SHAPE:
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
    if is_op(node, "Expand"):  # aligned from the right; a 1 of source or target takes the size of the other
        sizes = {known_size(source, axis - axes), _target_size(node.inputs[1], axis - axes)}
        return max(sizes - {None, 1}, default=1 if sizes == {1} else None)
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
    """The size that a target of Reshape or Expand, or the Concat that makes it, gives an axis as a positive number.

    An axis below 0 counts from the right.
    """
    array = constant(target)
    if array is None:
        part = target.producer()
        if not is_op(part, "Concat") or any(size(x, 0) != 1 for x in part.inputs) or axis not in _indices(part.inputs):
            return None
        array, axis = constant(part.inputs[axis]), 0
    found = array.reshape(-1) if array is not None else ()
    return int(found[axis]) if axis in _indices(found) and found[axis] > 0 else None


def _indices(entries) -> range:
    return range(-len(entries), len(entries))


def _remaining_size(node: ir.Node, axis: int, axes: int) -> int | None:
    """The -1 of a Reshape that splits the last axis in two, (.., width) -> (.., -1, size): width / size."""
    if axis != axes - 2 or rank(node.inputs[0]) != axes - 1:
        return None
    width, each = known_size(node.inputs[0], -1), _target_size(node.inputs[1], axes - 1)
    return width // each if width and each and width % each == 0 else None
