"""fuse_attention: a Softmax between two products becomes one ai.onnx Attention.

    MatMul(Softmax(scale * Q K^T + bias), V)  ->  Attention(Q, K, V, bias; scale)

Products over other axes become 4-D ones around the node. The value that the second product made keeps its name.
"""

import onnx_ir as ir

from qexport.rewrite import DeclinedError, LeftAlone
from qexport.rewrite.graph import Builder, attribute, consumers, is_op, shown
from qexport.rewrite.heads import Heads, find_heads
from qexport.rewrite.masks import attention_mask
from qexport.rewrite.probabilities import find_values
from qexport.rewrite.products import Operand, Weighed, scores_product, unflipped, values_product
from qexport.rewrite.scores import find_scores
from qexport.rewrite.sinks import add_sink
from qexport.rewrite.sites import module_of, site_name
from qexport.rewrite.ungroup_attention import ungrouped
from qexport.rewrite.values import known_size, many, rank, scalar, size

_SAMPLED_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def fuse_attention(model: ir.Model, opset: int) -> list[LeftAlone]:
    """Fuse every Softmax whose result weighs values, in place, subgraphs included.

    Args:
        opset: of the model; below 23 only what the spelled-out fallback can express is taken.

    Returns:
        The sites that stay, with the reason.
    """
    left_alone = []
    for softmax in [node for node in model.graph.all_nodes() if is_op(node, "Softmax")]:
        try:
            end = find_values(softmax)
            if end is None:
                continue  # a classifier's, router's or loss's softmax
            _fuse(softmax, *end, opset)
        except DeclinedError as reason:
            name = site_name(softmax)
            left_alone.append(LeftAlone(name, module_of(softmax), str(reason)))
    return left_alone


def _module_around(product: ir.Node) -> str:
    """The torch module of the nodes right behind a product; torch decomposes attention into nodes without a module name."""
    for user in consumers(product.outputs[0]):
        if found := module_of(user) or next((m for u in consumers(user.outputs[0]) if (m := module_of(u))), ""):
            return found
    return ""


def _fuse(
    softmax: ir.Node,
    product: ir.Node,
    probabilities: ir.Value,
    flipped: bool,
    way: list[ir.Value],
    cut: ir.Node | None,
    opset: int,
) -> None:
    _check_axis(softmax, rank(softmax.outputs[0]) or rank(product.outputs[0]))
    scores = find_scores(softmax)
    if cut is not None and not scores.sinks:
        raise DeclinedError(f"its probabilities pass Slice {shown(cut)} before they weigh the values")
    if scores.sinks and (cut is None or scores.softcap):
        raise DeclinedError(f"its scores have a sink, {'and a soft cap' if scores.softcap else 'whose weight is used'}")
    keys = scores_product(scores.product)
    values = values_product(product, probabilities, keys.rows, flipped)
    if keys.rank != values.rank:
        raise DeclinedError(f"its scores have {keys.rank} axes at the first product and {values.rank} at the second")
    for operand, what in ((keys.queries, "queries"), (keys.keys, "keys")):
        if operand.value.const_value is not None:
            raise DeclinedError(f"its {what} are constants of the model, so there is nothing to attend over")
    for dtype in {x.value.dtype for x in (keys.queries, keys.keys, values.values)} - {None, *_SAMPLED_TYPES}:
        raise DeclinedError(f"its type is {dtype.name.lower()}; QuantumAttention takes float32, float16 and bfloat16")
    if scores.softcap and opset < 23:
        raise DeclinedError("its scores have a soft cap, which the fallback below opset 23 cannot express")

    builder = Builder(product)
    keys.queries, scale = _peel_scale(keys.queries, scores.scale * keys.alpha)
    keys.keys, scale = _peel_scale(keys.keys, scale)
    keys.keys = unflipped(keys.keys)
    behind = [node for value in way if is_op(node := value.producer(), "Reshape")]
    heads = find_heads(builder, [*scores.reshapes, *behind], keys, values)
    operands = _of_one_type(builder, [heads.split(x) for x in (keys.queries, keys.keys, values.values)])
    q4, k4, v4 = _broadcast(builder, scores, heads, operands)
    for factor, divides, where in scores.factors:
        if rank(factor):
            factor = heads.aligned(factor, where)
        q4 = builder.node(
            "Div" if divides else "Mul", q4, builder.node("CastLike", factor, q4, like=q4), like=q4, shape=q4.shape
        )
    mask = attention_mask(builder, scores, heads, q4, k4)
    _replace_shapes(builder, [*scores.chain, *way], heads, q4, k4)
    for sink, where in scores.sinks:
        operands = (q4, *ungrouped(builder, q4, k4, v4))
        q4, k4, v4, mask = add_sink(builder, heads.aligned(sink, where), scale, operands, mask)
    _emit(builder, product, q4, k4, v4, mask, scale, scores, heads, values, softmax)


def _broadcast(builder: Builder, scores, heads: Heads, operands: list[ir.Value]) -> list[ir.Value]:
    """Q, K and V, repeated where products and what meets the scores broadcast a batch or head of 1, as Attention does not.

    Key heads are not repeated for those of the queries, which they serve.
    """
    met = [(value, where) for value, _, where in (*scores.factors, *scores.biases, *scores.masks)]
    met += scores.sinks
    if not heads.form.plain:
        n = len(heads.form.order)
        for value, axis in ((value, axis) for value, where in met if where == n for axis in heads.form.order[:-2]):
            if (count := many(value, axis - n)) is not None and heads.scores.queries.known_size(axis) == 1:
                raise DeclinedError(f"its queries have 1 of the {count} batches or heads of a mask or factor of its scores")
        return operands
    for axis in (0, 1):
        single = [known_size(x, axis) == 1 for x in operands]
        wide = [(x, axis) for x, one in zip(operands, single, strict=True) if not one][:1]
        wide += [(x, axis - 4 + rank(x)) for x, where in met if where == 4 and many(x, axis - 4) is not None]
        if axis == 1:  # Q by all, K and V by one another
            single = [single[0], single[1] and not single[2], single[2] and not single[1]]
        for (value, own), i in ((source, i) for source in wide for i in range(3) if single[i]):
            target = builder.concat(*([1] * axis), builder.axes(value, own, own + 1), *([1] * (3 - axis)))
            shape = [size(value, own) if a == axis else size(operands[i], a) for a in range(4)]
            operands[i] = builder.node("Expand", operands[i], target, like=operands[i], shape=shape)
    return operands


def _of_one_type(builder: Builder, operands: list[ir.Value]) -> list[ir.Value]:
    """Q, K and V as Attention takes them: in float32 where half-precision models compute the scores or values in it."""
    if len({x.dtype for x in operands} - {None}) < 2:
        return operands
    whole = ir.DataType.FLOAT
    return [x if x.dtype == whole else builder.node("Cast", x, to=whole.value, dtype=whole, shape=x.shape) for x in operands]


def _check_axis(softmax: ir.Node, n: int | None) -> None:
    axis = attribute(softmax, "axis", -1)
    if axis != -1 and axis + 1 != n:
        raise DeclinedError(f"its Softmax runs over axis {axis} of {n or 'unknown'}, not over the keys")


def _peel_scale(operand: Operand, scale: float) -> tuple[Operand, float]:
    """Move a number that multiplies Q or K into the scale; the operand without it."""
    value, perm = operand.value, operand.perm
    for _ in range(4):
        node = value.producer()
        if is_op(node, "Transpose") and "perm" in node.attributes and _is_scaled(node.inputs[0]):
            inner = node.attributes["perm"].as_ints()
            value, perm = node.inputs[0], [None if own is None else inner[own] for own in perm]
            continue
        if not _is_scaled(value):
            break
        inner, factor = _is_scaled(value)
        value, scale = inner, scale * factor
    return Operand(value, perm), scale


def _is_scaled(value: ir.Value) -> tuple[ir.Value, float] | None:
    """(x, c) when a value is x * c with a number c and the same shape as x."""
    node = value.producer()
    if not is_op(node, "Mul", "Div"):
        return None
    pairs = [(node.inputs[0], node.inputs[1])]
    if node.op_type == "Mul":
        pairs.append((node.inputs[1], node.inputs[0]))
    for inner, other in pairs:
        factor = scalar(other)
        if factor is not None and factor > 0 and inner.const_value is None and rank(inner) == rank(value):
            return inner, factor if node.op_type == "Mul" else 1.0 / factor
    return None


def _replace_shapes(builder: Builder, values: list[ir.Value], heads, q4: ir.Value, k4: ir.Value) -> None:
    """Sizes that the graph asks of the scores or probabilities, taken from Q and K instead, so that no one computes them."""
    for value in values:
        for shape in [use.node for use in value.uses() if is_op(use.node, "Shape")]:
            full = heads.scores_shape(q4, k4, value)
            start, end = attribute(shape, "start", 0), attribute(shape, "end")
            if start or end is not None:
                full = builder.node(
                    "Slice", full, [start], [end if end is not None else 1 << 31], [0], dtype=ir.DataType.INT64
                )
            old = shape.outputs[0]
            full.type, full.shape, name = ir.TensorType(ir.DataType.INT64), old.shape, old.name
            old.replace_all_uses_with(full, replace_graph_outputs=True)
            old.name, full.name = f"{name}/qexport_replaced", name
            shape.graph.remove(shape, safe=True)


def _emit(builder, product, q4, k4, v4, mask, scale, scores, heads: Heads, values: Weighed, softmax) -> None:
    out = product.outputs[0]
    attributes = {"scale": float(scale)}
    if scores.softcap:
        attributes["softcap"] = float(scores.softcap)
    if scores.cast:
        attributes["softmax_precision"] = int(ir.DataType.FLOAT)
    q_heads = known_size(q4, 1) or (known_size(scores.product.outputs[0], 1) if heads.form.plain else None)
    y = ir.Value(type=q4.type or out.type, shape=ir.Shape([size(q4, 0), q_heads, size(q4, 2), known_size(v4, 3)]))
    node = ir.Node(
        "",
        "Attention",
        [q4, k4, v4] + ([mask] if mask is not None else []),
        ir.convenience.convert_attributes(attributes),
        outputs=[y],
        name=site_name(softmax),
    )
    if module := module_of(softmax) or _module_around(product):
        node.metadata_props["qexport.module"] = module
    builder.anchor.graph.insert_before(builder.anchor, node)
    result = builder.transpose(heads.join(y), values.out_perm)
    if v4.dtype != values.values.value.dtype:
        result = builder.node("CastLike", result, values.values.value, like=values.values.value, shape=result.shape)
    name = out.name
    out.replace_all_uses_with(result, replace_graph_outputs=True)
    out.name = f"{name}/qexport_replaced"
    if result is not y:
        y.name = f"{name}/qexport_attention"
    result.name, result.type = name, out.type
    if result is not y:
        result.shape = out.shape
    product.graph.remove(product, safe=True)
