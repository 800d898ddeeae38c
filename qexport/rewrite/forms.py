"""What the axes of the scores are: batch, heads, queries or keys, at the products and where they are reshaped in between.

(n, i, j)                  n = batch * heads
(b, h, i, j)
(b, w, h, i, j)            windows and the like: w joins the batch
(b, h, g, i, j)            K and V have no g: groups of query heads that share a key head, wherever g lies
"""

from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from qexport.rewrite import DeclinedError
from qexport.rewrite.graph import attribute, is_op
from qexport.rewrite.products import Operand, Scores, Weighed
from qexport.rewrite.values import known_size, rank, scalar, size

_OTHERWISE = "its scores are reshaped between the products, and not only to split batches or join heads"


@dataclass
class Form:
    """A shape of the scores: its axes in the `order` batch, heads, queries, keys; the first `batch` of them make the batch.

    `sizes` are those of the axes of batch and heads in this order, None where they are open.
    """

    order: list[int]
    batch: int
    sizes: list[int | None]

    @property
    def plain(self) -> bool:
        """Whether it is (batch, heads, queries, keys)."""
        return self.order == [0, 1, 2, 3] and self.batch == 1


def form_of(scores: Scores, weighed: Weighed) -> Form:
    """The form of the scores at the products.

    Raises:
        DeclinedError: the operands are broadcast as Attention does not, and in more axes than it has.
    """
    axes = [axis for axis in range(scores.rank - 1) if axis != scores.rows]
    groups = [a for a in axes[1:] if scores.keys.known_size(a) == weighed.values.known_size(a) == 1]
    own = [axis for axis in axes if axis not in groups]
    batch = max(len(own) - 1, 1)
    sizes = [scores.queries.known_size(axis) for axis in (*own, *groups)]
    form = Form([*own, *groups, scores.rows, scores.rank - 1], batch, sizes)
    if not form.plain:
        _check_broadcast([scores.queries, scores.keys, weighed.values], own[:batch], own[batch:])
    return form


def _check_broadcast(operands: list[Operand], batch: list[int], heads: list[int]) -> None:
    """Products broadcast batches and heads of 1; Attention has one batch, and shares key heads among query heads only."""
    for what, axis in [*(("batches", a) for a in batch), *(("heads", a) for a in heads)]:
        sizes = [x.known_size(axis) for x in operands]
        if 1 in sizes and any(s != 1 for s in sizes):
            raise DeclinedError(f"its queries, keys and values have {', '.join(str(s or 'any') for s in sizes)} {what}")


def reshaped_form(reshapes: list[ir.Node], own: Form, scores: Scores) -> Form:
    """The form that the scores have between these Reshape nodes: with their first axis in parts, or with their heads joined.

    Raises:
        DeclinedError: they are reshaped in another way, or more than once.
    """
    values = [value for node in reshapes for value in (node.inputs[0], node.outputs[0])]
    ranks = [rank(value) for value in values]
    n = scores.rank
    m = next((r for r in ranks if r != n), None)
    spans = _spans(own, n, m) if m and all({*p} == {n, m} for p in zip(ranks[::2], ranks[1::2], strict=True)) else None
    if spans is None:
        raise DeclinedError(_OTHERWISE)
    before = [scores.queries.known_size(axis) for axis in range(n - 1)] + [scores.keys.known_size(scores.rows)]
    behind = [next((x for v in values if rank(v) == m and (x := known_size(v, axis))), None) for axis in range(m)]
    again = [next((x for v in values if rank(v) == n and (x := known_size(v, axis))), None) for axis in range(n)]
    pairs = [*zip(before, again, strict=True)]
    pairs += [(_product(before, a), _product(behind, b)) for a, b in spans]
    if n == 3 and behind[-2] not in (None, before[scores.rows]) and (behind[1] is None or before[scores.rows] is not None):
        raise DeclinedError("its heads are laid out as rows of its queries (multi-query attention)")
    if any(None not in pair and pair[0] != pair[1] for pair in pairs):
        raise DeclinedError(_OTHERWISE)
    if n == 3 and behind[1] is None:
        raise DeclinedError("the number of its heads is computed by the graph")
    order = list(dict.fromkeys(i for axis in own.order for a, b in spans if axis in a for i in b))
    parts = len(spans[0][1])
    if n > 3 and [behind[i] for i in range(parts)].count(None) > 1:
        raise DeclinedError("its scores are reshaped to batches whose numbers the graph computes")
    sizes = [behind[i] for i in order[:-2]]
    return Form(order, own.batch + (parts - 1) * (n > 3), sizes)


def _product(sizes: list[int | None], axes) -> int | None:
    found = [sizes[axis] for axis in axes]
    return prod(found) if None not in found else None


def _spans(own: Form, n: int, m: int) -> list[tuple[list[int], list[int]]] | None:
    """Pairs of axes, before and behind a Reshape, that hold the same; None when it does neither of the two."""
    heads, more = own.order[own.batch : -2], m - n
    if own.order[0] == 0 and more >= 1 and (n > 3 or more == 1):  # of three axes the first is batch and heads
        return [([0], [*range(more + 1)]), *(([axis], [axis + more]) for axis in range(1, n))]
    if len(heads) > 1 and more == 1 - len(heads) and heads == [*range(heads[0], heads[-1] + 1)]:
        joined = [min(axis, heads[0]) if axis <= heads[-1] else axis + more for axis in range(n)]
        return [([a for a in range(n) if joined[a] == axis], [axis]) for axis in range(m)]
    return None


def before_joining(value: ir.Value) -> ir.Value | None:
    """The 4-D value whose first two axes a Reshape joined into those of `value`; None unless sizes prove it, since Reshape
    also makes (batch, channels, pixels) of (batch, channels, height, width)."""
    node = value.producer()
    if not is_op(node, "Reshape") or rank(node.inputs[0]) != 4:
        return None
    source = node.inputs[0]
    ends = [known_size(source, axis) or size(source, axis) for axis in (2, 3)]
    return source if None not in ends and ends == [known_size(value, axis) or size(value, axis) for axis in (1, 2)] else None


def _is_multiple(reshape: ir.Node, count: int) -> bool:
    """Whether the first axis behind a Reshape from four axes is computed as batch * count."""
    batch = known_size(reshape.inputs[0], 0)
    if batch and known_size(reshape.outputs[0], 0) == batch * count:
        return True
    target = reshape.inputs[1].producer()
    first = target.inputs[0].producer() if is_op(target, "Concat") else None
    while is_op(first, "Unsqueeze", "Reshape", "Cast", "Identity"):
        first = first.inputs[0].producer()
    return is_op(first, "Mul") and count in [scalar(x) for x in first.inputs]


def joined_heads(value: ir.Value) -> int | None:
    """Number of heads of (batch * heads, rows, columns), from the 4-D value that was joined to it."""
    for _ in range(6):
        node = value.producer()
        if is_op(node, "Reshape") and rank(node.inputs[0]) == 4:
            count = known_size(node.inputs[0], 1)
            return count if count and (before_joining(value) is not None or _is_multiple(node, count)) else None
        if is_op(node, "Transpose") and rank(node.inputs[0]) == 3 and list(attribute(node, "perm", ())) == [1, 0, 2]:
            # nn.MultiheadAttention: (rows, batch * heads, columns), reshaped from (rows, batch, heads * columns)
            inner = node.inputs[0].producer()
            width, columns = known_size(inner.inputs[0], 2) if is_op(inner, "Reshape") else None, known_size(value, 2)
            return width // columns if width and columns and width % columns == 0 else None
        if not is_op(node, "Transpose", "Mul", "Div", "Identity", "Cast"):
            return None
        value = node.inputs[0] if rank(node.inputs[0]) == 3 else node.inputs[-1]
    return None
