"""From a Softmax back to the product of queries and keys: every way in which exporters scale, mask and reshape scores.

    Softmax(where(mask, softcap(scale * Q K^T) + bias, -inf))

The walk collects the scale, the additive biases, the boolean masks and the soft cap; it changes nothing in the graph.
"""

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qexport.rewrite import DeclinedError
from qexport.rewrite.graph import attribute, consumers, is_op, shown
from qexport.rewrite.sinks import is_sink
from qexport.rewrite.values import constant, is_single, known_size, rank, scalar

QUANTISED = (
    "MatMulInteger",
    "QLinearMatMul",
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
    "DynamicQuantizeLinear",
    "DequantizeLinear",
    "QGemm",
)
_PASSED = ("Add", "Sub", "Mul", "Div", "Where", "Cast", "Reshape", "Identity", "Dropout", "Tanh", "Max", "Clip")
# A masked score at or below this has no weight after the softmax beside any real score.
MASKED = -1e4


@dataclass
class Scores:
    """What lies between a Softmax and its product.

    `product` is the node of Q K^T; the scores are `scale` times it, through `softcap` (0: none), plus `biases` (value,
    factor, rank of the scores where it was added), kept where all of `masks` (value, keep when true, rank) say so.
    `factors` are values (value, divides, rank), one for all or one per row, that multiply the scores or divide them. `sinks`
    holds the column (value, rank) that stands behind the scores in the softmax, where one does. `chain` holds the values in
    between with a column per key, `reshapes` the Reshape nodes among them; `cast` says that the type changes on the way.
    """

    product: ir.Node
    scale: float = 1.0
    softcap: float = 0.0
    factors: list[tuple[ir.Value, bool, int | None]] = field(default_factory=list)
    biases: list[tuple[ir.Value, float, int | None]] = field(default_factory=list)
    masks: list[tuple[ir.Value, bool, int | None]] = field(default_factory=list)
    sinks: list[tuple[ir.Value, int | None]] = field(default_factory=list)
    chain: list[ir.Value] = field(default_factory=list)
    reshapes: list[ir.Node] = field(default_factory=list)
    cast: bool = False


def find_scores(softmax: ir.Node) -> Scores:
    """Walk back from a Softmax to the product that made its scores.

    Raises:
        DeclinedError: the way holds something that Attention has no place for; the text names it.
    """
    found = Scores(product=None)
    value, scale, user = softmax.inputs[0], 1.0, softmax  # scale: factor between `value` and the softmax
    for _ in range(32):
        node = value.producer()
        if node is None:
            raise DeclinedError("its scores are an input of the graph, not a product of queries and keys")
        others = [c for c in consumers(value) if c is not user]
        if others or value.is_graph_output():
            raise DeclinedError(f"its scores are also used by {_names(others) or 'an output of the graph'}")
        found.chain.append(value)
        if is_product(node):
            found.product, found.scale = node, scale
            return found
        if node.op_type in QUANTISED:
            raise DeclinedError(f"its scores are computed in quantised arithmetic ({node.op_type}); give the float model")
        value, scale, user = _step(node, scale, found)
    raise DeclinedError("no product of queries and keys within 32 nodes before its Softmax")


def is_product(node: ir.Node | None) -> bool:
    """Whether a node multiplies two batches of matrices."""
    return is_op(node, "MatMul", "Einsum") or is_op(node, "FusedMatMul", domain="com.microsoft")


def _step(node: ir.Node, scale: float, found: Scores) -> tuple[ir.Value, float, ir.Node]:
    """The value one node further from the softmax, the factor between it and the softmax, and the node that uses it."""
    op = node.op_type if is_op(node, *_PASSED) else None
    if op in ("Identity", "Cast", "Dropout"):
        if op == "Dropout" and not inference_dropout(node):
            raise DeclinedError("its scores pass a Dropout in training mode; export the model in eval mode")
        found.cast |= op == "Cast"
        return node.inputs[0], scale, node
    if op == "Reshape":
        found.reshapes.append(node)
        return node.inputs[0], scale, node
    if is_sink(node) and not follows_product(node.inputs[1]):
        if found.sinks or scale != 1.0 or found.factors or found.biases or found.masks or found.reshapes:
            raise DeclinedError(f"its scores are scaled, masked or reshaped together with the sink of {shown(node)}")
        found.sinks.append((node.inputs[1], rank(node.outputs[0])))
        found.chain.clear()
        return node.inputs[0], scale, node
    if op in ("Add", "Sub"):
        inner, other = _split(node)
        if op == "Sub" and inner is node.inputs[1]:
            raise DeclinedError("its scores are subtracted from another tensor")
        _nothing_inside(found, "a bias")
        found.biases.append((other, scale if op == "Add" else -scale, rank(node.outputs[0])))
        return inner, scale, node
    if op in ("Mul", "Div"):
        return _scaled(node, op, scale, found)
    if op == "Where":
        _nothing_inside(found, "a mask")
        return *_masked(node, scale, found), node
    if op in ("Max", "Clip"):
        if _changes_nothing(node):
            return node.inputs[0], scale, node
        raise DeclinedError(f"its scores pass a {op} that changes them")
    if op == "Tanh":
        raise DeclinedError("its scores pass a Tanh that is no soft cap")
    raise DeclinedError(f"its scores come from {node.op_type} {shown(node)}, not from a product of queries and keys")


def _changes_nothing(node: ir.Node) -> bool:
    """Whether the floor of a Max or Clip, and the ceiling of a Clip, lie beyond every score."""
    bounds = [(x, sign) for x, sign in zip(node.inputs[1:], (1, -1), strict=False) if x is not None]
    if node.op_type == "Max" and len(node.inputs) != 2:
        return False
    return all((bound := scalar(x)) is not None and sign * bound <= MASKED for x, sign in bounds)


def _nothing_inside(found: Scores, what: str) -> None:
    """Attention adds biases and masks after its soft cap, and after the scale."""
    if found.softcap:
        raise DeclinedError(f"its scores pass a soft cap after {what}")
    if found.factors:
        raise DeclinedError(f"its scores are multiplied by a computed number after {what}")


def inference_dropout(node: ir.Node) -> bool:
    """Whether a Dropout does nothing: the ratio is 0, or the training flag is off."""
    training = node.inputs[2] if len(node.inputs) > 2 else None
    flag = constant(training) if training is not None else False
    ratio = scalar(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return ratio == 0 or (flag is not None and not bool(flag)) or attribute(node, "is_test", 0) == 1


def _scaled(node: ir.Node, op: str, scale: float, found: Scores) -> tuple[ir.Value, float, ir.Node]:
    """Mul or Div: by a number (scale, or the outer half of a soft cap), or by what can multiply the queries instead.

    That is one number per row, head or batch, computed or not, and a number that is no scale, since a scale is above 0.
    """
    left, right = node.inputs[0], node.inputs[1]
    pairs = ((left, right),) if op == "Div" else ((left, right), (right, left))
    for inner, other in pairs:
        factor = scalar(other)
        if factor is None or factor <= 0:
            continue
        if op == "Mul" and is_op(inner.producer(), "Tanh"):
            return _soft_capped(inner, factor, scale, found)
        return inner, scale * factor if op == "Mul" else scale / factor, node
    for inner, other in pairs:
        if (is_single(other) or known_size(other, -1) == 1) and _distance(inner) is not None:
            found.factors.append((other, op == "Div", rank(node.outputs[0])))
            return inner, scale, node
    # s * m + (1 - m) * low with a mask m of 0 and 1, as in GPT and TensorFlow's GPT-2
    mask = inverted_mask(*found.biases[-1][:2]) if op == "Mul" and found.biases else None
    for inner, keep in pairs:
        if keep is mask and _zero_or_one(keep) and _distance(inner) is not None:
            found.biases.pop()
            found.masks.append((keep, True, rank(node.outputs[0])))
            return inner, scale, node
    if any(_reaches_quantised(x) for x in (left, right)):
        raise DeclinedError("its scores are computed in quantised arithmetic (MatMulInteger); give the float model")
    raise DeclinedError(f"its scores are multiplied element by element in {shown(node)}")


def inverted_mask(bias: ir.Value, factor: float) -> ir.Value | None:
    """m where a bias times `factor` is (1 - m) * low, as exporters write masks; else None."""
    product = bias.producer()
    for level, inverted in (product.inputs, product.inputs[::-1]) if is_op(product, "Mul") else ():
        low, sub = scalar(level), inverted.producer()
        if low is not None and low * factor <= MASKED and is_op(sub, "Sub") and scalar(sub.inputs[0]) == 1:
            return sub.inputs[1]
    return None


def _zero_or_one(value: ir.Value) -> bool:
    """Whether a value holds 0 and 1 alone: a truth value as a number, or a part of such a constant."""
    for _ in range(6):
        if value.dtype == ir.DataType.BOOL:
            return True
        array = constant(value, limit=1 << 24)
        if array is not None:
            return bool(np.isin(array, (0, 1)).all())
        node = value.producer()
        if not is_op(node, "Cast", "Slice", "Gather", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Expand"):
            return False
        value = node.inputs[0]
    return False


def _soft_capped(capped: ir.Value, cap: float, scale: float, found: Scores) -> tuple[ir.Value, float, ir.Node]:
    """cap * tanh(s / cap): a soft cap. The walk meets the division next and undoes the `cap` returned here."""
    tanh = capped.producer()
    if scale != 1.0 or cap <= 0 or found.factors or found.softcap or consumers(capped)[1:]:
        raise DeclinedError("its scores pass a Tanh that is no soft cap")
    found.softcap = cap
    found.chain.append(capped)
    return tanh.inputs[0], cap, tanh


def _masked(node: ir.Node, scale: float, found: Scores) -> tuple[ir.Value, float]:
    condition, yes, no = node.inputs
    for inner, fill, keep in ((yes, no, True), (no, yes, False)):
        level = _fill(fill)
        if level is None:
            continue
        if not level * scale <= MASKED:
            raise DeclinedError(f"its masked scores are set to {level:g}, which still leaves them weight")
        found.masks.append((condition, keep, rank(node.outputs[0])))
        return inner, scale
    raise DeclinedError(f"its scores pass a Where ({shown(node)}) whose other branch is no constant")


def _fill(value: ir.Value) -> float | None:
    """The number that a tensor is filled with everywhere, None when it is not such a tensor."""
    node = value.producer()
    if is_op(node, "ConstantOfShape"):
        tensor = attribute(node, "value")
        return float(tensor.numpy().reshape(-1)[0]) if tensor is not None else 0.0
    if is_op(node, "Expand"):
        return _fill(node.inputs[0])
    return scalar(value)


def _split(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The operand of an Add or Sub that leads to the product, and the other one."""
    left, right = node.inputs[0], node.inputs[1]
    distances = _distance(left), _distance(right)
    if distances[0] is None and distances[1] is None:
        if _reaches_quantised(left) or _reaches_quantised(right):
            raise DeclinedError("its scores are computed in quantised arithmetic (MatMulInteger); give the float model")
        raise DeclinedError(f"neither operand of {shown(node)} comes from a product of queries and keys")
    if None not in distances:
        raise DeclinedError(
            "its scores are the sum of two products (a position term computed from the queries or keys); as an attn_mask it "
            "would be a dense batch x heads x queries x keys tensor of every run"
        )
    return (left, right) if distances[0] is not None else (right, left)


def _distance(value: ir.Value, depth: int = 12) -> int | None:
    """Nodes between a value and a product through ops that scores pass; None when there is no such way."""
    node = value.producer()
    if node is None or depth == 0 or constant(value, limit=1) is not None:
        return None
    if is_product(node):
        return 0
    if not is_op(node, *_PASSED):
        return None
    operands = node.inputs if node.op_type in ("Add", "Sub", "Mul", "Div", "Where") else node.inputs[:1]
    found = [d for x in operands if x is not None and (d := _distance(x, depth - 1)) is not None]
    return min(found) + 1 if found else None


def follows_product(value: ir.Value) -> bool:
    """Whether a value comes from a product through ops that scores pass."""
    return _distance(value) is not None


def _reaches_quantised(value: ir.Value, depth: int = 8) -> bool:
    node = value.producer()
    if node is None or depth == 0:
        return False
    if node.op_type in QUANTISED:
        return True
    return node.op_type in _PASSED and any(_reaches_quantised(x, depth - 1) for x in node.inputs if x is not None)


def _names(nodes) -> str:
    return ", ".join(f"{node.op_type} {shown(node)}" for node in nodes[:2])
