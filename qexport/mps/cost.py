"""How long a product with a train takes, and how it is best computed. Standard library only.

Consecutive sites are merged into groups, whose cores multiply one after the other; all sites in one group are the matrix.
The groups are those of least estimated time, in the shapes of products that the kernel makes: the count of multiply-adds
alone is wrong by several times, since small products wait for their loads and for the calls (docs/mps.md).
cpp/mps_cost.cc is the same estimate and plans the kernel's products.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qexport.errors import UsageError
from qexport.mps.layout import Layout, check_bonds

FACTORED, DENSE = "factored", "dense"
METHODS = ("auto", FACTORED, DENSE)

# Nanoseconds of one thread with AVX-512; other processors differ by about the same factor in all of them.
STEP = 0.26  # of a register block of two vectors, per row and multiply-add in depth
BLOCK = 5.0  # to begin and end a register block
CALL = 8.0  # to begin a product
STORED = 0.2  # a number of a merged core
READ = 0.035  # a number of a core that is too large for a processor core's own cache, at least
NEAR = 1 << 17  # numbers that this holds
STREAMED = 0.25  # a number of a core that no cache holds, once written and each time it is read
CACHED = 1 << 22  # numbers that all of them hold
PANEL = 32  # columns of a register block
LEAST_ROWS = 8


@dataclass(frozen=True)
class Cost:
    """Estimated nanoseconds of a product with a train, on one thread, what is merged included.

    Attributes:
        factored: through the cores, some of them merged.
        dense: through the matrix, which is made first.
        numbers: of the train; the matrix has rows x cols.
        method: `factored` or `dense`, whichever takes less time.
        groups: how many sites each group of the chosen way has.
        reason: one line.
    """

    factored: float
    dense: float
    numbers: int
    method: str
    groups: tuple[int, ...]
    reason: str


@functools.lru_cache(maxsize=256)
def attention_cost(layout: Layout, bonds: tuple[int, ...], features: int, items: int = 1, method: str = "auto") -> Cost:
    """What MPSAttention takes for `items` matrices of values (cols, features), with one train.

    Raises:
        UsageError: bonds that are no chain from 1 to 1 over the sites, an unknown method.
    """
    panels = _panels(features)

    def time(group: _Group) -> float:
        merged = group.merging()
        if group.end < len(layout.row_factors):  # one call for many columns
            columns = group.rows_behind * panels * PANEL
            rows = group.left * group.r
            return merged + _products(items * group.columns_before, rows, group.c * group.right, columns)
        each = items * panels * group.columns_before
        if group.begin == 0:
            return merged + _products(each, group.r, group.c, PANEL) + items * _streamed(group.numbers)
        if group.left < LEAST_ROWS:
            rows = min(group.r, LEAST_ROWS)
            return merged + _products(each * group.left * math.ceil(group.r / rows), rows, group.c, PANEL)
        return merged + _products(each * group.r, group.left, group.c, PANEL)

    return _cost(layout, bonds, method, time, f"{features} features")


@functools.lru_cache(maxsize=256)
def linear_cost(layout: Layout, bonds: tuple[int, ...], tokens: int, constant: bool = True, method: str = "auto") -> Cost:
    """What MPOLinear takes for (tokens, rows) inputs; `constant`: merged cores are kept from run to run and cost nothing.

    Raises:
        UsageError: as `attention_cost`.
    """

    def time(group: _Group) -> float:
        merged = 0.0 if constant else group.merging()
        if group.end < len(layout.row_factors):
            depth = group.left * group.r
            return merged + _products(tokens * group.columns_before, group.c * group.right, depth, group.rows_behind)
        whole = group.begin == 0  # the matrix has no padding
        inputs, outputs = (layout.rows, layout.cols) if whole else (group.left * group.r, group.c)
        numbers, passes = inputs * outputs, math.ceil(tokens / 64)
        read = passes * numbers * READ if numbers > NEAR else 0.0
        time = max(_products(_panels(outputs), tokens * group.columns_before, inputs, PANEL), read)
        return merged + time + passes * _streamed(numbers)

    return _cost(layout, bonds, method, time, f"{tokens} tokens")


@dataclass(frozen=True)
class _Group:
    """The core of the sites [begin, end), and the factors of the sites around it, multiplied."""

    layout: Layout
    bonds: tuple[int, ...]
    begin: int
    end: int

    @property
    def left(self) -> int:
        return self.bonds[self.begin]

    @property
    def right(self) -> int:
        return self.bonds[self.end]

    @property
    def r(self) -> int:
        return math.prod(self.layout.row_factors[self.begin : self.end])

    @property
    def c(self) -> int:
        return math.prod(self.layout.col_factors[self.begin : self.end])

    @property
    def numbers(self) -> int:
        return self.left * self.r * self.c * self.right

    @property
    def columns_before(self) -> int:
        return math.prod(self.layout.col_factors[: self.begin])

    @property
    def rows_behind(self) -> int:
        return math.prod(self.layout.row_factors[self.end :])

    def merging(self) -> float:
        """To make the core from those of its two halves."""
        if self.end - self.begin == 1:
            return 0.0
        middle = self._split()
        c = math.prod(self.layout.col_factors[self.begin : middle])
        time = _products(self.left * self.r, c, self.bonds[middle], self.c // c * self.right)
        return time + self.numbers * STORED + _streamed(self.numbers)

    def _split(self) -> int:
        """The cut into halves: moving it by one site makes the larger half no smaller."""

        def larger(k: int) -> int:
            halves = (_Group(self.layout, self.bonds, self.begin, k), _Group(self.layout, self.bonds, k, self.end))
            return max(half.numbers for half in halves)

        middle = (self.begin + self.end) // 2
        for step in (-1, 1):
            while self.begin < middle + step < self.end and larger(middle + step) < larger(middle):
                middle += step
        return middle


def _panels(columns: int) -> int:
    return math.ceil(columns / PANEL)


def _products(count: int, rows: int, depth: int, columns: int) -> float:
    """`count` products of (rows, depth) with (depth, columns). Blocks have 8 rows, then 4, 2, 1; the last one waits for its
    loads."""
    steps, blocks = rows + 0.5 * (rows % 2), rows // 8 + (rows % 8).bit_count()
    return count * (CALL + _panels(columns) * (steps * depth * STEP + blocks * BLOCK))


def _streamed(numbers: int) -> float:
    return numbers * STREAMED if numbers > CACHED else 0.0


def _cost(layout: Layout, bonds: tuple[int, ...], method: str, time: Callable[[_Group], float], size: str) -> Cost:
    check_bonds(layout, bonds)
    if method not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    sites = len(layout.row_factors)
    dense = time(_Group(layout, bonds, 0, sites))
    factored, groups = _least(layout, bonds, time) if sites > 1 else (dense, (1,))
    through_matrix = sites == 1 or method == DENSE or (method == "auto" and dense <= factored)
    chosen = DENSE if through_matrix else FACTORED
    reason = (
        f"{chosen}: an estimated {factored / 1e6:.3g} ms through {len(groups)} groups of sites against {dense / 1e6:.3g} ms "
        f"through the matrix ({layout.rows} x {layout.cols}, bond dimension {max(bonds)}, {size}; one thread)"
    )
    return Cost(factored, dense, layout.numbers(bonds), chosen, (sites,) if through_matrix else groups, reason)


def _least(layout: Layout, bonds: tuple[int, ...], time: Callable[[_Group], float]) -> tuple[float, tuple[int, ...]]:
    """The time of the best groups, two or more, and their numbers of sites."""
    sites = len(layout.row_factors)
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]

    def ways(end: int) -> Iterator[tuple[float, tuple[int, ...]]]:
        for begin in range(end):
            if end - begin < sites:
                before, groups = best[begin]
                yield before + time(_Group(layout, bonds, begin, end)), (*groups, end - begin)

    for end in range(1, sites + 1):
        best.append(min(ways(end), key=lambda way: way[0]))
    return best[sites]
