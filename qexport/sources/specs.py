"""What the inputs of a third-party graph are, read off the graph: token ids by the table they pick from, and so on."""

import re

import numpy as np
import onnx_ir as ir

from qexport.rewrite.classical import RUNTIME_DOMAIN
from qexport.rewrite.graph import is_op
from qexport.rewrite.values import constant, known_size
from qexport.sources.kinds import kind_of
from qexport.sources.source import InputSpec

_PASSED = ("Cast", "Reshape", "Identity", "Unsqueeze", "Squeeze", "Flatten", "Slice", "Transpose")
# A number, a name or a sum of those: what `qexport.feeds.dim_size` knows the size of.
_TERM = r"\s*(?:[A-Za-z_]\w*|\d+)\s*"
_SUM = re.compile(rf"{_TERM}(?:\+{_TERM})*", re.ASCII)
_PADDING_INPUT = {"MultiHeadAttention": 4, "Attention": 3}
# What exporters call every axis of which they know nothing.
_NO_NAMES = {"", "?", "*", "-1", "none", "null", "unk", "unknown", "dynamic"}
# A table of position ids below this length is no position table.
_SHORTEST_TABLE = 8


def name_axes(model: ir.Model) -> None:
    """Give the axes of the inputs of a graph names that sizes can be looked up by, in place: exporters write "?", "2*n" and
    the like, leave axes without a name, and call all of them "None"."""
    given = {value: _names(value) for value in model.graph.inputs if value.shape is not None}
    # two axes of one input may be equal, as a square mask's are, but not by a name that means nothing
    alike = {name for dims in given.values() for name in dims if _means_nothing(name) and dims.count(name) > 1} | {""}
    names = {
        value: [f"{value.name}_dim_{i}" if name in alike else name for i, name in enumerate(dims)]
        for value, dims in given.items()
    }
    inner = (value for node in model.graph.all_nodes() for value in node.outputs if value.shape is not None)
    # where it would make axes of several values equal; shape inference finds those that are
    names |= {value: [None if _means_nothing(name) else name for name in _names(value)] for value in inner}
    taken, renamed = {name for dims in names.values() for name in dims}, {}
    for name in dict.fromkeys(name for value in given for name in names[value]):
        if isinstance(name, str) and not _SUM.fullmatch(name):
            stem = "axis_" + re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")
            choices = (stem, *(f"{stem}_{i}" for i in range(len(taken) + 1)))
            renamed[name] = next(choice for choice in choices if choice not in taken)
            taken.add(renamed[name])
    for value, dims in names.items():
        value.shape = ir.Shape([renamed.get(name, name) for name in dims])


def _names(value: ir.Value) -> list[int | str]:
    """Sizes and names of the axes of a value, "" where there is none."""
    return [d if isinstance(d, int) else d.value or "" for d in value.shape]


def _means_nothing(name: int | str) -> bool:
    return isinstance(name, str) and name.strip().lower() in _NO_NAMES


def spec_of(value: ir.Value) -> InputSpec:
    """The spec of a graph input: type, shape with dynamic axes named, kind, and the upper bound of ids."""
    dtype = value.dtype.numpy().name if value.dtype is not None else "float32"
    dims = list(value.shape) if value.shape is not None else []
    shape = [d if isinstance(d, int) else d.value for d in dims]
    kind = _runtime_kind(value) or kind_of(value.name, dtype)
    high = None
    if dtype.startswith(("int", "uint")):
        high = 2 if kind == "mask" else picked_rows(value)
        if kind == "integer" and high is not None and high > 2:
            kind = "token_ids"
    return InputSpec(value.name, dtype, shape, kind, high)


def _runtime_kind(value: ir.Value) -> str | None:
    """The kind of an input that onnxruntime's attention reads as its padding: a mask, or the numbers of keys that count."""
    for node, index in ((use.node, use.idx) for use in value.uses()):
        if _PADDING_INPUT.get(node.op_type) == index and node.domain == RUNTIME_DOMAIN:
            return "mask" if len(value.shape) > 1 else "lengths"
    return None


def picked_rows(value: ir.Value, depth: int = 6) -> int | None:
    """Number of rows of the table that a value of ids picks from with Gather, None when it picks from none."""
    for node, index in ((use.node, use.idx) for use in value.uses()):
        if is_op(node, "Gather") and index == 1:
            rows = known_size(node.inputs[0], 0)
            if rows is not None and len(node.inputs[0].shape) == 2:
                return rows
        if node.op_type == "EmbedLayerNormalization" and index in (0, 1):  # ids and segments, tables 2 and 4
            return known_size(node.inputs[2 + 2 * index], 0)
        if is_op(node, *_PASSED) and index == 0 and depth and (found := picked_rows(node.outputs[0], depth - 1)):
            return found
    return None


def tables(model: ir.Model) -> set[int]:
    """Numbers of rows of the 2-D weights that Gather picks from, word embeddings and positions among them."""
    picked = (node.inputs[0] for node in model.graph.all_nodes() if is_op(node, "Gather"))
    return {v.const_value.shape[0] for v in picked if v is not None and v.is_initializer() and len(v.const_value.shape) == 2}


def limits_of(model: ir.Model, inputs: list[InputSpec]) -> dict[str, int]:
    """The longest sequence, from a table of position ids 0, 1, 2, ... in the graph; empty when there is none."""
    axes = [spec.shape[1] for spec in inputs if spec.kind == "token_ids" and len(spec.shape) == 2]
    axes = [axis for axis in axes if isinstance(axis, str) and axis.isidentifier()]
    lengths = [rows for node in model.graph.all_nodes() if (rows := _runtime_positions(node))]
    lengths += [length for value in _integer_constants(model) if (length := _counted(value))]
    return {axes[0]: min(lengths)} if axes and lengths else {}


def _runtime_positions(node: ir.Node) -> int | None:
    """Rows of the position table of onnxruntime's EmbedLayerNormalization."""
    return known_size(node.inputs[3], 0) if node.op_type == "EmbedLayerNormalization" else None


def _integer_constants(model: ir.Model):
    """The int64 constants that are cut with Slice or looked up with Gather, as position ids are."""
    for node in model.graph.all_nodes():
        if is_op(node, "Slice", "Gather"):
            value = node.inputs[0]
            if value is not None and (value.dtype == ir.DataType.INT64 or is_op(value.producer(), "Constant")):
                yield value


def _counted(value: ir.Value) -> int | None:
    """n when the value is the constant 0, 1, ..., n - 1 (with leading axes of 1)."""
    array = constant(value, limit=1 << 20, depth=0)
    if array is None or array.dtype != np.int64 or array.size < _SHORTEST_TABLE or array.shape[-1] != array.size:
        return None
    return array.size if np.array_equal(array.reshape(-1), np.arange(array.size)) else None
