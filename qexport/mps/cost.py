"""What a product with a train costs, and whether the train or the matrix should be used. Standard library only."""

from dataclasses import dataclass

from qexport.mps.layout import Layout

FACTORED, DENSE = "factored", "dense"


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of M V for a (rows, cols) matrix and `features` columns.

    Attributes:
        factored: core by core.
        dense: with the matrix at hand.
        decode: to make the matrix from the train, once.
        numbers: of the train; the matrix has rows x cols.
        method: `factored` or `dense`, whichever takes fewer with the matrix at hand.
        reason: one line.
    """

    factored: int
    dense: int
    decode: int
    numbers: int
    method: str
    reason: str


def product_cost(layout: Layout, bonds: tuple[int, ...], features: int) -> Cost:
    """The cost of a product with a train with these bond dimensions, and which way is the cheaper one.

    For an interleaved layout of n = 2^L and one bond dimension throughout, `factored` is 2 n bond^2 log2(n) per feature
    against n^2: on paper the train wins up to a bond dimension of sqrt(n / (2 log2 n)), 7 at n = 1024.
    """
    sites = layout.shapes(bonds)
    rows, cols = 1, layout.padded[1]
    factored = 0
    for left, r, c, right in reversed(sites):
        cols //= c
        factored += cols * (left * r) * (c * right) * rows * features
        rows *= r
    decode, places = 0, 1
    for left, r, c, right in sites:
        decode += places * left * r * c * right
        places *= r * c
    dense = layout.rows * layout.cols * features
    method = FACTORED if factored < dense else DENSE
    reason = (
        f"{method}: {factored / 1e6:.3g} million multiply-adds core by core against {dense / 1e6:.3g} with the matrix "
        f"({layout.rows} x {layout.cols}, bond dimension {max(bonds)}, {features} features)"
    )
    return Cost(factored, dense, decode, layout.numbers(bonds), method, reason)
