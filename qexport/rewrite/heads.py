"""From the axes of the two products to (batch, heads, rows, columns), as Attention takes them, and back.

(n, i, d)                  n = batch * heads, split where the graph tells how many heads there are
(b, h, i, d)               as it is
(b, w, h, i, d)            windows and the like: w joins the batch
(b, h, g, i, d)            K and V (b, h, 1, j, d): groups of query heads that share a key head, wherever g lies
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import onnx_ir as ir

from qexport.rewrite import DeclinedError
from qexport.rewrite.graph import Builder, attribute, is_op
from qexport.rewrite.products import Operand, Scores, Weighed
from qexport.rewrite.values import known_size, rank, size


@dataclass
class Heads:
    """How operands with the axes of the scores become (batch, heads, rows, columns).

    `order` names the axes of the scores: the `batch` ones that make the batch, those that make the heads, queries, keys.
    `count` heads are split off the batch where there is no axis for them; 1 makes every slice a batch item of one head.
    """

    builder: Builder
    scores: Scores
    order: list[int]
    batch: int
    count: int = 1

    @property
    def plain(self) -> bool:
        """Whether the operands are (batch, heads, rows, columns) from the start."""
        return self.order == [0, 1, 2, 3] and self.batch == 1

    @cached_property
    def queries(self) -> ir.Value:
        """Q in this order, before its axes are folded: it has every batch and head."""
        return self._ordered(self.scores.queries)

    def split(self, operand: Operand) -> ir.Value:
        """An operand as (batch, heads, rows, columns); what is 1 in it stays 1.

        Any split of joined heads is right, since slices of axis 0 are independent; the true one gives heads their meaning.
        """
        value = self.queries if operand is self.scores.queries else self._ordered(operand)
        if rank(value) == 3 and self.count > 1 and (source := self._before_joining(value)) is not None:
            return source
        return self._folded(value, self.count)

    def _ordered(self, operand: Operand) -> ir.Value:
        perm = [operand.perm[axis] for axis in self.order]
        value = self.builder.transpose(operand.value, [own for own in perm if own is not None])
        for place in [i for i, own in enumerate(perm[: self.batch]) if own is None]:
            shape = [1 if i == place else size(value, i - (i > place)) for i in range(rank(value) + 1)]
            value = self.builder.node("Unsqueeze", value, [place], like=value, shape=shape)
        return value

    def _folded(self, value: ir.Value, count: int = 1) -> ir.Value:
        """A value whose axes are in this order with each group of axes made one; it may lack heads."""
        axes = rank(value)
        rows, columns = size(value, axes - 2), size(value, axes - 1)
        batch = size(value, 0) if self.batch == 1 and count == 1 else None
        if self.batch == 1 and axes == 4:
            return value
        if self.batch == 1 and axes == 3 and count == 1:
            return self.builder.node("Unsqueeze", value, [1], like=value, shape=[batch, 1, rows, columns])
        sizes = [known_size(value, axis) for axis in range(self.batch, axes - 2)]
        heads = prod(sizes) * count if None not in sizes else None
        some = heads or self._product(self.builder.axes(value, self.batch, axes - 2))
        target = self.builder.concat(-1, some, self.builder.axes(value, axes - 2, axes))
        return self.builder.node("Reshape", value, target, like=value, shape=[batch, heads, rows, columns])

    def _product(self, sizes: ir.Value) -> ir.Value:
        return self.builder.node("ReduceProd", sizes, keepdims=1, dtype=ir.DataType.INT64, shape=[1])

    def _before_joining(self, value: ir.Value) -> ir.Value | None:
        """The 4-D value that a Reshape joined into `value`, when its sizes prove that rows and columns stayed."""
        node = value.producer()
        if not is_op(node, "Reshape") or rank(node.inputs[0]) != 4 or known_size(node.inputs[0], 1) != self.count:
            return None
        source = node.inputs[0]
        same = all(size(value, a) is not None and size(value, a) == size(source, a + 1) for a in (1, 2))
        return source if same else None

    def join(self, value: ir.Value) -> ir.Value:
        """(batch, heads, rows, columns) with the axes of the scores again."""
        if len(self.order) == 3 and self.count == 1:
            value = self.builder.node("Squeeze", value, [1], like=value)
        elif len(self.order) != 4 or self.batch != 1:
            value = self.builder.node("Reshape", value, self._opened(value), like=value, shape=[None] * len(self.order))
        return self.builder.transpose(value, [self.order.index(axis) for axis in range(len(self.order))])

    def _opened(self, value: ir.Value) -> ir.Value:
        """Sizes of the axes in this order of a folded value: as numbers where known, with a -1 for the first that is not."""
        sizes = [known_size(self.queries, axis) for axis in range(len(self.order) - 2)]
        if None in sizes:
            sizes[sizes.index(None)] = -1
        sizes = [self.builder.axes(self.queries, i, i + 1) if x is None else x for i, x in enumerate(sizes)]
        return self.builder.concat(*sizes, self.builder.axes(value, 2, 4))

    def scores_shape(self, q4: ir.Value, k4: ir.Value, value: ir.Value) -> ir.Value:
        """Sizes of the scores as `value` holds them: with their own axes, or with four where joined heads were split."""
        ends = [self.builder.axes(x, 2, 3) for x in (q4, k4)]
        if self.plain or rank(value) != len(self.order):
            return self.builder.concat(self.builder.axes(q4, 0, 2), *ends)
        parts = [self.builder.axes(self.queries, i, i + 1) for i in range(len(self.order) - 2)] + ends
        return self.builder.concat(*(parts[self.order.index(axis)] for axis in range(len(self.order))))

    def aligned(self, value: ir.Value, where: int | None) -> ir.Value:
        """What met scores of `where` axes, broadcastable to (batch, heads, rows, columns).

        Axes that become one are broadcast among each other first, unless all are 1.
        """
        n = len(self.order)
        if self.plain or where != n or (self.order[-2:] == [n - 2, n - 1] and rank(value) <= 2):
            return value
        if missing := n - rank(value):
            shape = [1] * missing + list(value.shape or [None] * (n - missing))
            value = self.builder.node("Unsqueeze", value, list(range(missing)), like=value, shape=shape)
        value = self.builder.transpose(value, self.order)
        sizes, full = ([known_size(x, axis) for axis in range(n - 2)] for x in (value, self.queries))
        target = [1] * n
        count = self.count if sizes[0] != 1 else 1
        for group in (range(self.batch), range(self.batch, n - 2)):
            own = [sizes[axis] for axis in group]
            if (len(own) > 1 or count > 1) and set(own) != {1} and (None in own or own != [full[axis] for axis in group]):
                for axis in group:
                    target[axis] = full[axis] or self.builder.axes(self.queries, axis, axis + 1)
        if target != [1] * n:
            found = [full[axis] if target[axis] != 1 else sizes[axis] for axis in range(n - 2)]
            shape = [*found, size(value, n - 2), size(value, n - 1)]
            value = self.builder.node("Expand", value, self.builder.concat(*target), like=value, shape=shape)
        return self._folded(value, count)


def find_heads(builder: Builder, reshapes: list[ir.Node], scores: Scores, weighed: Weighed) -> Heads:
    """How the operands of the two products become 4-D.

    Args:
        reshapes: what lies between the two products, before the softmax and behind it.

    Raises:
        DeclinedError: the scores are reshaped in a way that is not a split of the heads, or the operands are broadcast as
            Attention does not.
    """
    n = scores.rank
    axes = [axis for axis in range(n - 1) if axis != scores.rows]
    groups = [a for a in axes[1:] if scores.keys.known_size(a) == weighed.values.known_size(a) == 1]
    own = [axis for axis in axes if axis not in groups]
    batch = max(len(own) - 1, 1)
    heads = Heads(builder, scores, [*own, *groups, scores.rows, n - 1], batch)
    _check_broadcast([scores.queries, scores.keys, weighed.values], own[:batch], own[batch:])
    heads.count = _joined_heads(reshapes, scores)
    return heads


def _check_broadcast(operands: list[Operand], batch: list[int], heads: list[int]) -> None:
    """Products broadcast batches and heads of 1; Attention has one batch, and shares key heads among query heads only."""
    for axis in batch:
        sizes = [x.known_size(axis) for x in operands]
        if 1 in sizes and any(s != 1 for s in sizes):
            raise DeclinedError(f"its queries, keys and values have batches of {', '.join(str(s or 'any') for s in sizes)}")
    for axis in heads:
        q, k, v = (x.known_size(axis) for x in operands)
        lacks = operands[0].perm[axis] is None
        if (q == 1 and k not in ((1,) if lacks else (1, None))) or (k != v and 1 in (k, v)):
            raise DeclinedError(f"its queries, keys and values have {', '.join(str(s or 'any') for s in (q, k, v))} heads")


def _joined_heads(reshapes: list[ir.Node], scores: Scores) -> int:
    """Number of heads joined with the batch in axis 0 of the scores; 1 where they have an axis or none is known."""
    shapes = [(rank(node.inputs[0]), rank(node.outputs[0])) for node in reshapes]
    n = scores.rank
    if n > 3:
        if any(pair != (n, n) for pair in shapes):
            axes = next(r for pair in shapes for r in pair if r != n)
            raise DeclinedError(f"its scores are reshaped to {axes or 'unknown'} axes on their way to the Softmax (windows)")
        if shapes:
            raise DeclinedError("its scores are reshaped between the products")
        return 1
    if not shapes:
        return _heads_before(scores.queries.value) or _heads_before(scores.keys.value) or 1
    if any(set(pair) != {3, 4} for pair in shapes) or any(_moves_rows(node) for node in reshapes):
        raise DeclinedError("its scores are reshaped between the products, and not only to split the heads")
    opened = next(node for node, pair in zip(reshapes, shapes, strict=True) if pair == (3, 4))
    count = known_size(opened.outputs[0], 1)
    if count is None:
        raise DeclinedError("the number of its heads is computed by the graph")
    return count


def _moves_rows(reshape: ir.Node) -> bool:
    """Whether queries or keys are known to be others behind a Reshape, as where the heads were rows of the queries."""
    pairs = [[known_size(value, axis) for value in (reshape.inputs[0], reshape.outputs[0])] for axis in (-2, -1)]
    return any(None not in pair and pair[0] != pair[1] for pair in pairs)


def _heads_before(value: ir.Value) -> int | None:
    """Number of heads of (batch * heads, rows, columns), from the 4-D value that was joined to it."""
    for _ in range(6):
        node = value.producer()
        if is_op(node, "Reshape") and rank(node.inputs[0]) == 4:
            return known_size(node.inputs[0], 1)
        if is_op(node, "Transpose") and rank(node.inputs[0]) == 3 and list(attribute(node, "perm", ())) == [1, 0, 2]:
            # nn.MultiheadAttention: (rows, batch * heads, columns), reshaped from (rows, batch, heads * columns)
            inner = node.inputs[0].producer()
            width, columns = known_size(inner.inputs[0], 2) if is_op(inner, "Reshape") else None, known_size(value, 2)
            return width // columns if width and columns and width % columns == 0 else None
        if not is_op(node, "Transpose", "Mul", "Div", "Identity", "Cast"):
            return None
        value = node.inputs[0] if rank(node.inputs[0]) == 3 else node.inputs[-1]
    return None
