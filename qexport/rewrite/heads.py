"""From products over (batch * heads, rows, columns) to (batch, heads, rows, columns) and back, and grouped heads."""

from dataclasses import dataclass

import onnx_ir as ir

from qexport.rewrite import DeclinedError
from qexport.rewrite.graph import Builder, attribute, is_op
from qexport.rewrite.values import constant, known_size, rank, size


@dataclass
class Heads:
    """How 3-D operands become 4-D ones: `count` heads split off axis 0; 1 makes every slice a batch item of one head.

    `joined` is true when the operands are 4-D from the start and nothing has to be done.
    """

    builder: Builder
    joined: bool
    count: int = 1

    def split(self, value: ir.Value) -> ir.Value:
        """(batch * heads, rows, columns) -> (batch, heads, rows, columns); 4-D values pass.

        Any split of axis 0 is right, since its slices are independent; the true one gives heads their meaning.
        """
        if self.joined:
            return value
        rows, columns = size(value, 1), known_size(value, 2)
        if self.count == 1:
            return self.builder.node("Unsqueeze", value, [1], like=value, shape=[size(value, 0), 1, rows, columns])
        if (source := self._before_joining(value)) is not None:
            return source
        target = self.builder.concat([-1, self.count], self.builder.axes(value, 1, 3))
        return self.builder.node("Reshape", value, target, like=value, shape=[None, self.count, rows, columns])

    def _before_joining(self, value: ir.Value) -> ir.Value | None:
        """The 4-D value that a Reshape joined into `value`, when its sizes prove that rows and columns stayed."""
        node = value.producer()
        if not is_op(node, "Reshape") or rank(node.inputs[0]) != 4 or known_size(node.inputs[0], 1) != self.count:
            return None
        source = node.inputs[0]
        same = all(size(value, a) is not None and size(value, a) == size(source, a + 1) for a in (1, 2))
        return source if same else None

    def join(self, value: ir.Value) -> ir.Value:
        """(batch, heads, rows, columns) -> (batch * heads, rows, columns)."""
        if self.joined:
            return value
        if self.count == 1:
            return self.builder.node("Squeeze", value, [1], like=value)
        return self.builder.node("Reshape", value, self.builder.concat([-1], self.builder.axes(value, 2, 4)), like=value)

    def scores_shape(self, q4: ir.Value, k4: ir.Value, value: ir.Value) -> ir.Value:
        """Sizes of the scores as `value` holds them: (batch, heads, q_len, kv_len), or joined when `value` is 3-D."""
        if self.joined or rank(value) == 4:
            return self.builder.concat(self.builder.axes(q4, 0, 3), self.builder.axes(k4, 2, 3))
        return self.joined_shape(q4, k4)

    def joined_shape(self, q4: ir.Value, k4: ir.Value) -> ir.Value:
        """Sizes (batch * heads, q_len, kv_len) of the joined scores."""
        both = self.builder.node("ReduceProd", self.builder.axes(q4, 0, 2), keepdims=1, dtype=ir.DataType.INT64)
        return self.builder.concat(both, self.builder.axes(q4, 2, 3), self.builder.axes(k4, 2, 3))


def split_heads(builder: Builder, reshapes: list[ir.Node], keys, n: int) -> Heads:
    """How the operands of a product of rank `n` become 4-D.

    Args:
        reshapes: what lies between the two products, before the softmax and behind it.

    Raises:
        DeclinedError: the scores are reshaped in a way that is not a split of the heads.
    """
    shapes = [(rank(node.inputs[0]), rank(node.outputs[0])) for node in reshapes]
    if n == 4:
        if any(pair != (4, 4) for pair in shapes):
            axes = next(r for pair in shapes for r in pair if r != 4)
            raise DeclinedError(f"its scores are reshaped to {axes or 'unknown'} axes on their way to the Softmax (windows)")
        if shapes:
            raise DeclinedError("its scores are reshaped between the products")
        return Heads(builder, joined=True)
    if not shapes:
        return Heads(builder, joined=False, count=_heads_before(keys.left.value) or _heads_before(keys.right.value) or 1)
    if any(set(pair) != {3, 4} for pair in shapes) or any(_moves_rows(node) for node in reshapes):
        raise DeclinedError("its scores are reshaped between the products, and not only to split the heads")
    opened = next(node for node, pair in zip(reshapes, shapes, strict=True) if pair == (3, 4))
    count = known_size(opened.outputs[0], 1)
    if count is None:
        raise DeclinedError("the number of its heads is computed by the graph")
    return Heads(builder, joined=False, count=count)


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


def ungroup_attention(model: ir.Model) -> None:
    """Let Attention nodes with heads of their own axis read the key and value heads before these were repeated."""
    for node in [n for n in model.graph.all_nodes() if is_op(n, "Attention") and not attribute(n, "q_num_heads")]:
        if any(x is not None for x in node.inputs[4:6]):
            continue  # past heads are as many as the repeated ones
        for index, value in zip((1, 2), ungrouped(*node.inputs[:3]), strict=True):
            node.replace_input_with(index, value)


def ungrouped(q: ir.Value, k: ir.Value, v: ir.Value) -> tuple[ir.Value, ir.Value]:
    """K and V before they were repeated for groups of query heads (Unsqueeze, Expand, Reshape), where that is certain."""
    pairs = [_before_repeat(x) for x in (k, v)]
    if None in pairs or known_size(pairs[0], 1) != known_size(pairs[1], 1):
        return k, v
    q_heads, kv_heads = known_size(q, 1) or known_size(k, 1), known_size(pairs[0], 1)
    return tuple(pairs) if q_heads and kv_heads and q_heads % kv_heads == 0 else (k, v)


def _before_repeat(value: ir.Value) -> ir.Value | None:
    reshape = value.producer()
    expand = reshape.inputs[0].producer() if is_op(reshape, "Reshape") else None
    unsqueeze = expand.inputs[0].producer() if is_op(expand, "Expand") else None
    if not is_op(unsqueeze, "Unsqueeze") or rank(unsqueeze.inputs[0]) != 4:
        return None
    axes = constant(unsqueeze.inputs[1]) if len(unsqueeze.inputs) > 1 else None
    source = unsqueeze.inputs[0]
    heads, total = known_size(source, 1), known_size(value, 1)
    certain = (
        axes is not None
        and list(axes) == [2]
        and heads is not None
        and total is not None
        and total % heads == 0
        and known_size(value, 3) is not None
        and known_size(value, 3) == known_size(source, 3)
    )
    return source if certain else None
