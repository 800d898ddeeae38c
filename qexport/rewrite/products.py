"""The two products of an attention, Q K^T and P V, in one form: operands with a permutation that brings their axes in order.

MatMul(A, B)                    scores (.., i, j) = A (.., i, d) B (.., d, j)
FusedMatMul(alpha, transA/B)    the same of com.microsoft, transposed and scaled
Einsum("bihd,bjhd->bhij")       any two-operand equation without repeated letters
"""

from dataclasses import dataclass
from string import ascii_lowercase

import onnx_ir as ir

from qexport.rewrite import DeclinedError
from qexport.rewrite.graph import attribute, is_op, shown
from qexport.rewrite.values import rank


@dataclass
class Operand:
    """A value and the permutation that brings it to (batch axes, rows, columns)."""

    value: ir.Value
    perm: list[int]


@dataclass
class Product:
    """Two operands with the batch axes in the order of the output; `alpha` scales it.

    Of scores: `left` = Q (batch.., i, d), `right` = K (batch.., j, d), `out_perm` the identity.
    Of values: `left` = P (batch.., i, j), `right` = V (batch.., j, d), `out_perm` permutes (batch.., i, d) to the output.
    """

    left: Operand
    right: Operand
    rank: int
    alpha: float = 1.0
    out_perm: list[int] | None = None


def scores_product(node: ir.Node) -> Product:
    """Q K^T as operands Q (.., i, d) and K (.., j, d).

    Raises:
        DeclinedError: the ranks are unknown or not 3 or 4, or the equation is no batched product.
    """
    if is_op(node, "Einsum"):
        a, b, out = _equation(node)
        i, j = out[-2], out[-1]
        left, right = (0, 1) if i in (a, b)[0] else (1, 0)
        q, k = (a, b)[left], (a, b)[right]
        contracted = (set(q) & set(k)) - set(out)
        if i in k or j in q or len(contracted) != 1:
            raise DeclinedError(f"its scores are the Einsum {attribute(node, 'equation')!r}, no product of queries and keys")
        d = contracted.pop()
        batch = out[:-2]
        return Product(
            Operand(node.inputs[left], _order(q, [*batch, i, d])),
            Operand(node.inputs[right], _order(k, [*batch, j, d])),
            len(out),
        )
    n, alpha, flip_a, flip_b = _matmul(node)
    if alpha <= 0:
        raise DeclinedError(f"its scores are scaled by {alpha:g} in {shown(node)}; the scale of Attention is above 0")
    return Product(Operand(node.inputs[0], _perm(n, flip_a)), Operand(node.inputs[1], _perm(n, not flip_b)), n, alpha)


def flips(node: ir.Node | None) -> bool:
    """Whether a node is a Transpose that swaps rows and columns and nothing else."""
    perm = list(attribute(node, "perm", ())) if is_op(node, "Transpose") else []
    return len(perm) > 1 and perm == _perm(len(perm), True)


def values_product(node: ir.Node, probabilities: ir.Value, flipped: bool) -> Product:
    """P V as operands P (.., i, j) and V (.., j, d), also where it is spelled (P V)^T = V^T P^T.

    Args:
        probabilities: the operand of `node` that is P, or P^T when `flipped`.

    Raises:
        DeclinedError: as `scores_product`, or the probabilities stand on the wrong side.
    """
    if is_op(node, "Einsum"):
        a, b, out = _equation(node)
        left = 0 if node.inputs[0] is probabilities else 1
        p, v = (a, b)[left], (a, b)[1 - left]
        i, j, batch = p[-1 if flipped else -2], p[-2 if flipped else -1], p[:-2]
        rest = [letter for letter in out if letter not in [*batch, i]]
        if len(rest) != 1 or j not in v or j in out or i in v:
            raise DeclinedError(f"its result is the Einsum {attribute(node, 'equation')!r}, no product with values")
        d = rest[0]
        return Product(
            Operand(probabilities, list(range(len(p)))),
            Operand(node.inputs[1 - left], _order(v, [*batch, j, d])),
            len(p),
            out_perm=_order([*batch, i, d], list(out)),
        )
    n, alpha, flip_a, flip_b = _matmul(node)
    on_right = node.inputs[0] is not probabilities
    if alpha != 1.0:
        raise DeclinedError("its probabilities are scaled before they weigh the values")
    if on_right != (flipped != (flip_b if on_right else flip_a)):
        raise DeclinedError("its probabilities meet the other factor with their queries, so they weigh no values")
    p = Operand(probabilities, _perm(n, flipped))
    if on_right:
        return Product(p, Operand(node.inputs[0], _perm(n, not flip_a)), n, out_perm=_perm(n, True))
    return Product(p, Operand(node.inputs[1], _perm(n, flip_b)), n)


def _matmul(node: ir.Node) -> tuple[int, float, bool, bool]:
    """(rank, alpha, left transposed, right transposed) of a MatMul or FusedMatMul."""
    ranks = [rank(x) for x in node.inputs[:2]]
    if None in ranks:
        known = [r for r in (*ranks, rank(node.outputs[0])) if r is not None]
        ranks = [r if r is not None else max(known, default=None) for r in ranks]
    if None in ranks:
        raise DeclinedError(f"the number of axes of {shown(node)} is unknown")
    if ranks[0] != ranks[1] or ranks[0] not in (3, 4):
        raise DeclinedError(
            f"{shown(node)} multiplies tensors of {ranks[0]} and {ranks[1]} axes; 4 and 4 or 3 and 3 are known"
        )
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        raise DeclinedError(f"{shown(node)} transposes its batch axes")
    return (
        ranks[0],
        attribute(node, "alpha", 1.0),
        bool(attribute(node, "transA", 0)),
        bool(attribute(node, "transB", 0)),
    )


def _perm(n: int, flipped: bool) -> list[int]:
    order = list(range(n))
    if flipped:
        order[-2:] = [n - 1, n - 2]
    return order


def _equation(node: ir.Node) -> tuple[list[str], list[str], list[str]]:
    text = _without_ellipsis(attribute(node, "equation", "").replace(" ", ""), rank(node.outputs[0]))
    inputs, _, out = text.partition("->")
    parts = inputs.split(",")
    if len(parts) != 2 or not out or "." in text or any(len(set(p)) != len(p) for p in (*parts, out)):
        raise DeclinedError(f"the Einsum {text!r} is no batched product of two tensors")
    if {len(parts[0]), len(parts[1]), len(out)} - {3, 4} or len({len(parts[0]), len(parts[1]), len(out)}) != 1:
        raise DeclinedError(f"the Einsum {text!r} has no 3 or 4 axes on every side")
    return list(parts[0]), list(parts[1]), list(out)


def _without_ellipsis(text: str, axes: int | None) -> str:
    """An equation with letters for the "..." of every term, the same axes in all; `axes` of its output."""
    terms = text.replace("->", ",").split(",")
    if axes is None or not all("..." in term for term in terms):
        return text
    unused = sorted(set(ascii_lowercase) - set(text))
    return text.replace("...", "".join(unused[: axes - len(terms[-1]) + 3]))


def _order(have: list[str], want: list[str]) -> list[int]:
    if set(have) != set(want):
        raise DeclinedError(f"an Einsum over {''.join(have)} has no axes {''.join(want)}")
    return [have.index(letter) for letter in want]
