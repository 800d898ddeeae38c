"""The two products of an attention, Q K^T and P V, in one form: operands by the axes of the scores.

MatMul(A, B)                            scores (.., i, j) = A (.., i, d) B (.., d, j), leading axes of 1 broadcast
FusedMatMul(alpha, transA/B)            the same of com.microsoft, transposed and scaled
Einsum("bikgd,bjkd->bkgij")             any two-operand equation without repeated letters
"""

from dataclasses import dataclass
from string import ascii_lowercase

import onnx_ir as ir

from qexport.rewrite import DeclinedError
from qexport.rewrite.graph import attribute, is_op, shown
from qexport.rewrite.values import known_size, rank


@dataclass
class Operand:
    """A value and, for each axis of the scores, the axis of the value that lies there; None where it has none.

    In the place of the keys, the last axis of the scores, lies the size of a head. K and V have their keys in the place of
    the queries.
    """

    value: ir.Value
    perm: list[int | None]

    def known_size(self, axis: int) -> int | None:
        """The size of the value at an axis of the scores, 1 where it has none, None when unknown."""
        own = self.perm[axis]
        return 1 if own is None else known_size(self.value, own)


@dataclass
class Scores:
    """Q K^T: `queries` Q and `keys` K; the scores have `rank` axes, the queries along `rows`, and are scaled by `alpha`."""

    queries: Operand
    keys: Operand
    rank: int
    rows: int
    alpha: float = 1.0


@dataclass
class Weighed:
    """P V: `values` V; P has `rank` axes, which `out_perm` permutes, the size of a head for the keys, to the result's."""

    values: Operand
    rank: int
    out_perm: list[int]


def unflipped(operand: Operand) -> Operand:
    """An operand without a swap of its last axes by way of three, Reshape(Transpose(Reshape(x))), as torch spells K^T."""
    closed = operand.value.producer()
    flip = closed.inputs[0].producer() if is_op(closed, "Reshape") else None
    opened = flip.inputs[0].producer() if flips(flip) else None
    if not is_op(opened, "Reshape") or rank(flip.inputs[0]) != 3:
        return operand
    source, value, middle = opened.inputs[0], operand.value, flip.inputs[0]
    if rank(source) != 4 or rank(value) != 4:
        return operand
    heads = {known_size(source, 1), known_size(value, 1)}
    columns = {known_size(source, 3), known_size(middle, 2), known_size(value, 2)}
    rows = {known_size(source, 2), known_size(middle, 1), known_size(value, 3)} - {None}
    if None in heads | columns or len(heads) > 1 or len(columns) > 1 or len(rows) > 1:
        return operand
    return Operand(source, [None if own is None else [0, 1, 3, 2][own] for own in operand.perm])


def scores_product(node: ir.Node) -> Scores:
    """Q K^T.

    Raises:
        DeclinedError: the ranks are unknown or below 3, or the equation is no batched product.
    """
    if is_op(node, "Einsum"):
        a, b, out = _equation(node)
        j, left = out[-1], 0 if out[-1] in b else 1
        q, k = (a, b)[left], (a, b)[1 - left]
        queries, keys = node.inputs[left], node.inputs[1 - left]
        contracted = (set(q) | set(k)) - set(out)
        rows = [letter for letter in out[:-1] if letter not in k]
        if j in q or len(contracted) != 1 or not contracted <= set(q) & set(k) or not rows:
            raise DeclinedError(f"its scores are the Einsum {attribute(node, 'equation')!r}, no product of queries and keys")
        # groups of heads are no axis of the keys either, but fewer than the queries, whose number is mostly open
        i = max(reversed(rows), key=lambda letter: known_size(queries, q.index(letter)) or float("inf"))
        d = contracted.pop()
        return Scores(
            Operand(queries, _places(q, [*out[:-1], d])),
            Operand(keys, _places(k, [j if letter == i else letter for letter in out[:-1]] + [d])),
            len(out),
            out.index(i),
        )
    ranks, alpha, flip_a, flip_b = _matmul(node)
    if alpha <= 0:
        raise DeclinedError(f"its scores are scaled by {alpha:g} in {shown(node)}; the scale of Attention is above 0")
    n = max(ranks)
    queries = Operand(node.inputs[0], _perm(n, flip_a, ranks[0]))
    keys = Operand(node.inputs[1], _perm(n, not flip_b, ranks[1]))
    return Scores(queries, keys, n, n - 2, alpha)


def flips(node: ir.Node | None) -> bool:
    """Whether a node is a Transpose that swaps rows and columns and nothing else."""
    perm = list(attribute(node, "perm", ())) if is_op(node, "Transpose") else []
    return len(perm) > 1 and perm == _perm(len(perm), True)


def values_product(node: ir.Node, probabilities: ir.Value, rows: int, flipped: bool) -> Weighed:
    """P V, also where it is spelled (P V)^T = V^T P^T.

    Args:
        probabilities: the operand of `node` that is P, or P^T when `flipped`.
        rows: the axis of P along which the queries lie.

    Raises:
        DeclinedError: as `scores_product`, or the probabilities stand on the wrong side.
    """
    if is_op(node, "Einsum"):
        a, b, out = _equation(node)
        left = 0 if node.inputs[0] is probabilities else 1
        p, v = (a, b)[left], (a, b)[1 - left]
        p = [*p[:-2], p[-1], p[-2]] if flipped else p
        i, j, kept = p[rows], p[-1], p[:-1]
        rest = [letter for letter in out if letter not in kept]
        if len(rest) != 1 or not set(kept) <= set(out) or j not in v or j in out or i in v or not set(v) <= {*p, *rest}:
            raise DeclinedError(f"its result is the Einsum {attribute(node, 'equation')!r}, no product with values")
        values = Operand(node.inputs[1 - left], _places(v, [j if letter == i else letter for letter in kept] + rest))
        return Weighed(values, len(p), _places([*kept, *rest], out))
    ranks, alpha, flip_a, flip_b = _matmul(node)
    n = max(ranks)
    on_right = node.inputs[0] is not probabilities
    if alpha != 1.0:
        raise DeclinedError("its probabilities are scaled before they weigh the values")
    if rows != n - 2:
        raise DeclinedError(f"its queries lie along axis {rows} of the scores and along axis {n - 2} in {shown(node)}")
    if on_right != (flipped != (flip_b if on_right else flip_a)):
        raise DeclinedError("its probabilities meet the other factor with their queries, so they weigh no values")
    if on_right:
        return Weighed(Operand(node.inputs[0], _perm(n, not flip_a, ranks[0])), ranks[1], _perm(n, True))
    return Weighed(Operand(node.inputs[1], _perm(n, flip_b, ranks[1])), ranks[0], _perm(n, False))


def _matmul(node: ir.Node) -> tuple[list[int], float, bool, bool]:
    """(ranks, alpha, left transposed, right transposed) of a MatMul or FusedMatMul."""
    ranks = [rank(x) for x in node.inputs[:2]]
    if None in ranks:
        known = [r for r in (*ranks, rank(node.outputs[0])) if r is not None]
        ranks = [r if r is not None else max(known, default=None) for r in ranks]
    if None in ranks:
        raise DeclinedError(f"the number of axes of {shown(node)} is unknown")
    if min(ranks) < 2 or max(ranks) < 3:
        raise DeclinedError(f"{shown(node)} multiplies tensors of {ranks[0]} and {ranks[1]} axes, which leaves no batch")
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        raise DeclinedError(f"{shown(node)} transposes its batch axes")
    return (
        ranks,
        attribute(node, "alpha", 1.0),
        bool(attribute(node, "transA", 0)),
        bool(attribute(node, "transB", 0)),
    )


def _perm(n: int, flipped: bool, axes: int | None = None) -> list[int | None]:
    """The `axes` axes (all when None) of an operand in order as the last of `n`, or with its last two swapped."""
    missing = n - (axes or n)
    order = [None] * missing + list(range(n - missing))
    if flipped:
        order[-2:] = order[:-3:-1]
    return order


def _equation(node: ir.Node) -> tuple[list[str], list[str], list[str]]:
    text = _without_ellipsis(attribute(node, "equation", "").replace(" ", ""), rank(node.outputs[0]))
    inputs, _, out = text.partition("->")
    parts = inputs.split(",")
    if len(parts) != 2 or not out or "." in text or any(len(set(p)) != len(p) for p in (*parts, out)):
        raise DeclinedError(f"the Einsum {text!r} is no batched product of two tensors")
    if len(out) < 3:
        raise DeclinedError(f"the Einsum {text!r} has {len(out)} axes on the right, which leaves no batch")
    return list(parts[0]), list(parts[1]), list(out)


def _without_ellipsis(text: str, axes: int | None) -> str:
    """An equation with letters for the "..." of every term, the same axes in all; `axes` of its output."""
    terms = text.replace("->", ",").split(",")
    if axes is None or not all("..." in term for term in terms):
        return text
    unused = sorted(set(ascii_lowercase) - set(text))
    return text.replace("...", "".join(unused[: axes - len(terms[-1]) + 3]))


def _places(have: list[str], want: list[str]) -> list[int | None]:
    return [have.index(letter) if letter in have else None for letter in want]
