"""fuse_softmax: a softmax over the keys that is written by hand becomes one Softmax.

    e = Exp(x - m),  e / sum(e)  ->  Softmax(x)        m the maximum of x, or nothing; sum(e) may have a small number added

    Softmax(x - m)                    ->  Softmax(x)

Reduced axes may be kept, or come back by Unsqueeze, Reshape and Expand; the quotient may be a product with the Reciprocal.
"""

import onnx_ir as ir
import onnx_ir.passes.common as passes

from qexport.rewrite import DeclinedError, LeftAlone
from qexport.rewrite.graph import attribute, consumers, is_op, shown
from qexport.rewrite.scores import follows_product, is_product
from qexport.rewrite.sites import module_of
from qexport.rewrite.values import constant, known_size, rank, scalar

_MOVED = ("Identity", "Unsqueeze", "Reshape", "Expand")
# What may be added to a sum of which one term is 1.
_SMALL = 1e-6


def fuse_softmax(model: ir.Model) -> list[LeftAlone]:
    """Replace every softmax by hand between two products in place, subgraphs included.

    Returns:
        What looks like one and stays, with the reason.
    """
    for softmax in [node for node in model.graph.all_nodes() if is_op(node, "Softmax")]:
        if attribute(softmax, "axis", -1) in (-1, (rank(softmax.outputs[0]) or 0) - 1):
            softmax.replace_input_with(0, _without_maximum(softmax.inputs[0]))
    left_alone = []
    for exp in [node for node in model.graph.all_nodes() if is_op(node, "Exp") and follows_product(node.inputs[0])]:
        sums = [node for node in _nodes_behind(exp, 3) if is_op(node, "ReduceSum")]
        if not sums or not any(is_product(node) for node in _nodes_behind(exp, 5)):
            continue
        try:
            _fuse(exp)
        except DeclinedError as reason:
            name = (exp.name or exp.outputs[0].name).replace("Exp", "Attention")
            left_alone.append(LeftAlone(name, module_of(exp), f"its softmax is written by hand, and {reason}"))
    passes.RemoveUnusedNodesPass()(model)
    return left_alone


def _nodes_behind(node: ir.Node, depth: int) -> list[ir.Node]:
    """The nodes within a few behind a node, as far as to products."""
    if depth == 0 or is_product(node):
        return []
    users = [user for value in node.outputs for user in consumers(value)]
    return users + [found for user in users for found in _nodes_behind(user, depth - 1)]


def _fuse(exp: ir.Node) -> None:
    e = exp.outputs[0]
    users = consumers(e)
    total = next((user for user in users if is_op(user, "ReduceSum")), None)
    if total is None:
        raise DeclinedError(f"its exponentials pass {users[0].op_type} {shown(users[0])} before they are summed")
    if any(is_product(user) for user in users):
        raise DeclinedError("its exponentials weigh the values before they are divided by their sum")
    if len(users) > 2 or e.is_graph_output():
        raise DeclinedError("its exponentials are used for more than their sum and quotient")
    if _axes(total) != {rank(e) - 1 if rank(e) else None}:
        raise DeclinedError(f"{shown(total)} sums along other axes than the last")
    scores = _without_maximum(exp.inputs[0])
    quotient = _quotient(e, total, _SMALL if scores is not exp.inputs[0] else 0.0)
    softmax = ir.Node(
        "",
        "Softmax",
        [scores],
        [ir.AttrInt64("axis", -1)],
        outputs=[ir.Value(type=e.type, shape=e.shape)],
        name=(quotient.name or "").replace(quotient.op_type, "Softmax"),
        metadata_props=dict(quotient.metadata_props),
    )
    quotient.graph.insert_before(quotient, softmax)
    old, new = quotient.outputs[0], softmax.outputs[0]
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{old.name}/qexport_replaced", old.name


def _axes(reduction: ir.Node) -> set[int] | None:
    """The axes that are reduced, counted from 0; None for all or unknown ones."""
    found = attribute(reduction, "axes")
    if found is None and len(reduction.inputs) > 1:
        found = constant(reduction.inputs[1])
    axes = rank(reduction.inputs[0])
    return {int(axis) % axes for axis in found} if found is not None and axes else None


def _without_maximum(value: ir.Value) -> ir.Value:
    """x of x - m with m the maximum of x over the keys at least; the value itself where nothing such is taken off."""
    difference = value.producer()
    if not is_op(difference, "Sub"):
        return value
    x, m = difference.inputs
    for _ in range(8):
        node = m.producer()
        if is_op(node, "ReduceMax"):
            axes = _axes(node)
            same = _source(node.inputs[0]) is _source(x)
            return _source(x) if same and (axes is None or rank(x) is None or rank(x) - 1 in axes) else value
        if is_op(node, *_MOVED):
            m = node.inputs[0]
        elif is_op(node, "Max", "Where"):  # a guard against rows of -inf: a row may lose any number
            kept = [v for v in node.inputs[-2:] if scalar(v) is None]
            if len(kept) != 1:
                return value
            m = kept[0]
        else:
            return value
    return value


def _source(value: ir.Value) -> ir.Value:
    while is_op(value.producer(), "Identity"):
        value = value.producer().inputs[0]
    return value


def _quotient(e: ir.Value, total: ir.Node, small: float) -> ir.Node:
    """The node that divides `e` by its sum, which may have a number up to `small` added."""
    value, inverted, expanded = total.outputs[0], False, False
    for _ in range(8):
        users = consumers(value)
        if len(users) != 1 or value.is_graph_output():
            raise DeclinedError(f"the sum {shown(total)} is used for more than a quotient")
        node = users[0]
        other = next((x for x in node.inputs if x is not value), None)
        column = expanded or (rank(value) == rank(e) and known_size(value, -1) == 1)
        if column and other is e and is_op(node, "Mul" if inverted else "Div") and (inverted or node.inputs[0] is e):
            return node
        added = scalar(other) if is_op(node, "Add", "Max") and not inverted else None
        if not (is_op(node, *_MOVED, "Reciprocal") or (added is not None and 0 <= added <= small)):
            break
        if is_op(node, "Expand") and not column:
            break
        expanded |= node.op_type == "Expand"
        inverted ^= node.op_type == "Reciprocal"
        value = node.outputs[0]
    raise DeclinedError(f"its exponentials are not divided by their sum {shown(total)} alone")
