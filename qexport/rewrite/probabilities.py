"""From a Softmax on to the product of its probabilities with the values."""

import onnx_ir as ir

from qexport.rewrite import DeclinedError
from qexport.rewrite.graph import consumers, is_op, shown
from qexport.rewrite.products import flips
from qexport.rewrite.scores import QUANTISED, inference_dropout, is_product
from qexport.rewrite.sinks import drops_last
from qexport.rewrite.values import constant, scalar


def find_values(softmax: ir.Node) -> tuple[ir.Node, ir.Value, bool, list[ir.Value], ir.Node | None] | None:
    """Walk on from a Softmax to the product with the values.

    Returns:
        (product node, its operand that holds the probabilities, whether transposed, the values on the way up to there, the
        Slice that drops the column of a sink), or None when the softmax weighs no values.

    Raises:
        DeclinedError: it does, but the probabilities are used elsewhere too or pass an op that Attention lacks.
    """
    value, way, flipped, cut = softmax.outputs[0], [], False, None
    for _ in range(12):
        if not flipped:
            way.append(value)
        users = consumers(value)
        guard = _nan_guard(value, users)
        if guard is not None:
            way.append(guard[0])
            value = guard[1]
            continue
        products = [u for u in users if is_product(u)]
        quantised = [u for u in users if u.op_type in (*QUANTISED, "QuantizeLinear")]
        if quantised and _meets_product(quantised[0]):
            raise DeclinedError(f"its probabilities are quantised ({quantised[0].op_type}) before they weigh the values")
        if len(users) > 1 or value.is_graph_output():
            if not products and not any(_meets_product(u, 3) for u in users):
                return None
            other = [f"{u.op_type} {shown(u)}" for u in users if u not in products[:1]]
            raise DeclinedError(f"its probabilities are also used by {other[0] if other else 'an output of the graph'}")
        if not users:
            return None
        user = users[0]
        if is_product(user):
            return (user, value, flipped, way, cut) if not _weighs_constant(user, value) else None
        if is_op(user, "Dropout") and not inference_dropout(user):
            raise DeclinedError("its probabilities pass a Dropout in training mode; export the model in eval mode")
        if is_op(user, "Cast", "Identity", "Dropout") or (not flipped and (flips(user) or is_op(user, "Reshape"))):
            flipped |= flips(user)
            value = user.outputs[0]
            continue
        if drops_last(user) and cut is None and not flipped and not any(is_op(x.producer(), "Reshape") for x in way):
            cut, value = user, user.outputs[0]
            way.clear()  # those have a column more
            continue
        if _meets_product(user, 2) and is_op(user, "Mul", "Add", "Sub", "Div", "Where", "Transpose", "Reshape", "Slice"):
            raise DeclinedError(f"its probabilities pass {user.op_type} {shown(user)} before they weigh the values")
        return None
    return None


def _nan_guard(value: ir.Value, users: list[ir.Node]) -> tuple[ir.Value, ir.Value] | None:
    """(flag, guarded probabilities) of Where(IsNaN(p), 0, p), which exporters put behind a softmax."""
    if len(users) != 2 or not any(is_op(u, "IsNaN") for u in users):
        return None
    check, select = users if is_op(users[0], "IsNaN") else users[::-1]
    if not is_op(select, "Where") or select.inputs[0] is not check.outputs[0] or select.inputs[2] is not value:
        return None
    return (check.outputs[0], select.outputs[0]) if scalar(select.inputs[1]) == 0 else None


def _meets_product(node: ir.Node, depth: int = 4) -> bool:
    """Whether a product of matrices follows within a few nodes."""
    if is_product(node) or node.op_type in (
        "MatMulInteger",
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
    ):
        return True
    return depth > 0 and any(_meets_product(u, depth - 1) for out in node.outputs for u in consumers(out))


def _weighs_constant(product: ir.Node, probabilities: ir.Value) -> bool:
    other = product.inputs[1] if product.inputs[0] is probabilities else product.inputs[0]
    return other.const_value is not None or constant(other, limit=1 << 40, depth=0) is not None
