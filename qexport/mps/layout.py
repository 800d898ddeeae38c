"""How the indices of a matrix are cut into the sites of a tensor train. Standard library only."""

import math
from dataclasses import dataclass

from qexport.arguments import whole
from qexport.errors import UsageError

PRIMES = (5, 3, 2)  # sizes of a site's row and column index; other lengths are padded with zeros to a product of these
KINDS = ("serial", "interleaved")


def prime_factors(n: int) -> tuple[int, ...]:
    """The prime factors, largest first, of the smallest number >= n that has none above 5: 197 -> 200 = 5 5 2 2 2."""
    while True:
        factors, rest = [], n
        for prime in PRIMES:
            while rest % prime == 0:
                factors.append(prime)
                rest //= prime
        if rest == 1:
            return tuple(factors)
        n += 1


@dataclass(frozen=True)
class Layout:
    """The sites of a tensor train that stands for a (rows, cols) matrix.

    Site k has a row index below row_factors[k] and a column index below col_factors[k], the most significant site first:
    i = ((i_1 r_2 + i_2) r_3 + i_3) .. and likewise j. The products of the factors are the padded sizes.

    Raises:
        UsageError: no site, lists of different lengths, a factor below 1, or fewer places than rows or columns.
    """

    rows: int
    cols: int
    row_factors: tuple[int, ...]
    col_factors: tuple[int, ...]

    def __post_init__(self):
        if not self.row_factors or len(self.row_factors) != len(self.col_factors):
            raise UsageError(
                "row_factors and col_factors must be of one length >= 1, "
                f"got {len(self.row_factors)} and {len(self.col_factors)}"
            )
        for name, size, factors in (("rows", self.rows, self.row_factors), ("cols", self.cols, self.col_factors)):
            whole(name, size)
            if min(factors) < 1 or math.prod(factors) < size:
                raise UsageError(f"{name[:-1]}_factors must be >= 1 with a product >= {name} = {size}, got {list(factors)}")

    @property
    def padded(self) -> tuple[int, int]:
        """Sizes of the matrix that the sites can hold."""
        return math.prod(self.row_factors), math.prod(self.col_factors)

    @property
    def kind(self) -> str:
        """`interleaved` where any site has both a row and a column index, else `serial`."""
        both = any(r > 1 and c > 1 for r, c in zip(self.row_factors, self.col_factors, strict=True))
        return "interleaved" if both else "serial"

    def bonds(self, bond_dim: int) -> tuple[int, ...]:
        """The largest bond dimensions that are of use, from the left end (1) to the right end (1):
        min(bond_dim, product of the factors to the left, product of those to the right).

        Raises:
            UsageError: bond_dim below 1.
        """
        whole("bond_dim", bond_dim)
        sizes = [r * c for r, c in zip(self.row_factors, self.col_factors, strict=True)]
        cuts = range(len(sizes) + 1)
        return tuple(min(bond_dim, math.prod(sizes[:k]), math.prod(sizes[k:])) for k in cuts)

    def shapes(self, bonds: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
        """Shape of each core: (bonds[k], row_factors[k], col_factors[k], bonds[k + 1])."""
        return list(zip(bonds[:-1], self.row_factors, self.col_factors, bonds[1:], strict=True))

    def numbers(self, bonds: tuple[int, ...]) -> int:
        """Numbers in all cores together."""
        return sum(map(math.prod, self.shapes(bonds)))


def make_layout(kind: str, rows: int, cols: int) -> Layout:
    """The sites of a (rows, cols) matrix.

    Args:
        kind: `interleaved`: a site holds a digit of the row and the digit of the column that weighs as much; a shorter
            index has digits of 1 in front. `serial`: all digits of the row, then all of the column.
        rows, cols: of the matrix; padded where they have prime factors above 5.

    Raises:
        UsageError: an unknown kind, or a size below 1.
    """
    if kind not in KINDS:
        raise UsageError(f"layout must be one of {', '.join(KINDS)}, got {kind!r}")
    for name, size in (("rows", rows), ("cols", cols)):
        whole(name, size)
    r, c = prime_factors(rows), prime_factors(cols)
    if kind == "serial":
        r, c = r + (1,) * len(c), (1,) * len(r) + c
    else:
        sites = max(len(r), len(c))
        r, c = (1,) * (sites - len(r)) + r, (1,) * (sites - len(c)) + c
    return Layout(rows, cols, r or (1,), c or (1,))


def check_bonds(layout: Layout, bonds: tuple[int, ...]) -> None:
    """Raise UsageError where `bonds` are not sites + 1 numbers >= 1 that begin and end with 1."""
    sites = len(layout.row_factors)
    if len(bonds) != sites + 1 or min(bonds) < 1 or bonds[0] != 1 or bonds[-1] != 1:
        raise UsageError(f"bonds must be {sites + 1} numbers >= 1 with a 1 at each end, got {list(bonds)}")
