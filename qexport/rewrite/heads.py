"""From the axes of the two products to (batch, heads, rows, columns), as Attention takes them, and back."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import onnx_ir as ir

from qexport.rewrite.forms import Form, before_joining, form_of, joined_heads, reshaped_form
from qexport.rewrite.graph import Builder
from qexport.rewrite.products import Operand, Scores, Weighed
from qexport.rewrite.values import known_size, rank, size


@dataclass
class Heads:
    """How operands with the axes of the scores become (batch, heads, rows, columns).

    `form` is the shape of the scores at the products, `other` the one that they are reshaped to in between, where they are.
    `count` heads are split off the batch where there is no axis for them; 1 makes every slice a batch item of one head.
    """

    builder: Builder
    scores: Scores
    form: Form
    other: Form | None = None
    count: int = 1

    @cached_property
    def queries(self) -> ir.Value:
        """Q with its axes in the order of the form, before they are folded: it has every batch and head."""
        return self._ordered(self.scores.queries)

    def split(self, operand: Operand) -> ir.Value:
        """An operand as (batch, heads, rows, columns); what is 1 in it stays 1.

        Any split of joined heads is right, since slices of axis 0 are independent; the true one gives heads their meaning.
        """
        value = self.queries if operand is self.scores.queries else self._ordered(operand)
        source = before_joining(value) if rank(value) == 3 and self.count > 1 else None
        if source is not None and known_size(source, 1) == self.count:
            return source
        return self._folded(value, self.form.batch, self.count)

    def _ordered(self, operand: Operand) -> ir.Value:
        perm = [operand.perm[axis] for axis in self.form.order]
        value = self.builder.transpose(operand.value, [own for own in perm if own is not None])
        for place in [i for i, own in enumerate(perm[: self.form.batch]) if own is None]:
            shape = [1 if i == place else size(value, i - (i > place)) for i in range(rank(value) + 1)]
            value = self.builder.node("Unsqueeze", value, [place], like=value, shape=shape)
        return value

    def _folded(self, value: ir.Value, batch: int, count: int) -> ir.Value:
        """A value of the axes batch, heads, rows, columns, with each group of axes made one; it may lack heads."""
        axes = rank(value)
        rows, columns = size(value, axes - 2), size(value, axes - 1)
        first = size(value, 0) if batch == 1 and count == 1 else None
        if batch == 1 and axes == 4:
            return value
        if batch == 1 and axes == 3 and count == 1:
            return self.builder.node("Unsqueeze", value, [1], like=value, shape=[first, 1, rows, columns])
        sizes = [known_size(value, axis) for axis in range(batch, axes - 2)]
        heads = prod(sizes) * count if None not in sizes else None
        some = heads or self.builder.node(
            "ReduceProd", self.builder.axes(value, batch, axes - 2), keepdims=1, dtype=ir.DataType.INT64, shape=[1]
        )
        target = self.builder.concat(-1, some, self.builder.axes(value, axes - 2, axes))
        return self.builder.node("Reshape", value, target, like=value, shape=[first, heads, rows, columns])

    def join(self, value: ir.Value) -> ir.Value:
        """(batch, heads, rows, columns) with the axes of the scores again."""
        order = self.form.order
        if len(order) == 3 and self.count == 1:
            value = self.builder.node("Squeeze", value, [1], like=value)
        elif len(order) != 4 or self.form.batch != 1:
            sizes = list(self.form.sizes)
            if None in sizes:
                sizes[sizes.index(None)] = -1
            sizes = [x or self._size(self.form, i) for i, x in enumerate(sizes)]
            target = self.builder.concat(*sizes, self.builder.axes(value, 2, 4))
            value = self.builder.node("Reshape", value, target, like=value, shape=[None] * len(order))
        return self.builder.transpose(value, [order.index(axis) for axis in range(len(order))])

    def _size(self, form: Form, place: int) -> int | ir.Value:
        """The size of an axis of the batch or heads of a form, by its place in the order: a number or a vector of one."""
        if form.sizes[place] is not None:
            return form.sizes[place]
        parts = max(len(form.order) - len(self.form.order), 0) + 1  # of the first axis
        if parts == 1 or place >= parts:
            return self.builder.axes(self.queries, place - parts + 1, place - parts + 2)
        others = prod(x for i, x in enumerate(form.sizes[:parts]) if i != place)
        return self.builder.node("Div", self.builder.axes(self.queries, 0, 1), [others], dtype=ir.DataType.INT64, shape=[1])

    def scores_shape(self, q4: ir.Value, k4: ir.Value, value: ir.Value) -> ir.Value:
        """Sizes of the scores as `value` holds them: in either form."""
        ends = [self.builder.axes(x, 2, 3) for x in (q4, k4)]
        form = next(f for f in (self.other, self.form) if f is self.form or (f is not None and len(f.order) == rank(value)))
        if form.plain:
            return self.builder.concat(self.builder.axes(q4, 0, 2), *ends)
        parts = [self._size(form, i) for i in range(len(form.sizes))] + ends
        return self.builder.concat(*(parts[form.order.index(axis)] for axis in range(len(form.order))))

    def aligned(self, value: ir.Value, where: int | None) -> ir.Value:
        """What met scores of `where` axes, broadcastable to (batch, heads, rows, columns).

        Axes that become one are broadcast among each other first, unless all are 1.
        """
        form = next((f for f in (self.form, self.other) if f is not None and len(f.order) == where), None)
        if form is None or form.plain or (form.order[-2:] == [where - 2, where - 1] and rank(value) <= 2):
            return value
        if missing := where - rank(value):
            shape = [1] * missing + list(value.shape or [None] * (where - missing))
            value = self.builder.node("Unsqueeze", value, list(range(missing)), like=value, shape=shape)
        value = self.builder.transpose(value, form.order)
        sizes, target = [known_size(value, i) for i in range(where - 2)], [1] * where
        count = self.count if where == 3 and sizes[0] != 1 else 1
        for group in (range(form.batch), range(form.batch, where - 2)):
            own, full = ([of[i] for i in group] for of in (sizes, form.sizes))
            if (len(own) > 1 or count > 1) and set(own) != {1} and (None in own or own != full):
                for i in group:
                    target[i] = self._size(form, i)
        if target != [1] * where:
            found = [form.sizes[i] if target[i] != 1 else sizes[i] for i in range(where - 2)]
            shape = [*found, size(value, where - 2), size(value, where - 1)]
            value = self.builder.node("Expand", value, self.builder.concat(*target), like=value, shape=shape)
        return self._folded(value, form.batch, count)


def find_heads(builder: Builder, reshapes: list[ir.Node], scores: Scores, weighed: Weighed) -> Heads:
    """How the operands of the two products become 4-D.

    Args:
        reshapes: what lies between the two products, before the softmax and behind it.

    Raises:
        DeclinedError: as `form_of` and `reshaped_form`.
    """
    heads = Heads(builder, scores, form_of(scores, weighed))
    if reshapes:
        heads.other = reshaped_form(reshapes, heads.form, scores)
    if scores.rank == 3:
        known = joined_heads(scores.queries.value) or joined_heads(scores.keys.value)
        heads.count = heads.other.sizes[1] if reshapes else known or 1
    return heads
