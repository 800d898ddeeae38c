"""Weights as strings of symbols: trellis-coded quantisation, at any number of bits from 1 to 6, and between.

A row of a weight becomes a string of symbols of 1 to 6 bits (`cpp/include/qexport/trellis.h`). The last 12 bits up to a
symbol pick its value from a table of normal quantiles in random order (QTIP, Tseng et al., NeurIPS 2024). With normal
numbers, 2 to 4 bits come within 0.8 to 1.3 dB of what any code of so many bits can reach; codes of 4 bits with a scale for
32 numbers, 4.5 bits in all, stay 5.5 dB behind it. Rows that the outputs depend on more get more bits. A runtime makes the
matrix when it loads the file (`decoding`).
"""

import os
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist

import numpy as np

from qexport.ops.kernels import kernels

WINDOW = 12
# Bits of a symbol; two symbols are read at once, from three bytes at most (`decoding`).
LEAST_BITS, MOST_BITS = 1, 6
# Symbols whose bits fill whole bytes, whatever they have of them.
GROUP = 8
# What a row's root mean square is brought to, by its bits: table and search waste least there (measured on normal numbers).
SPREAD = {1: 1.1, 2: 0.97, 3: 0.93, 4: 0.91, 5: 0.88, 6: 0.86}
# Numbers that the table does not reach by more than this, in units of the root mean square of their row, are stored apart.
MARGIN = 0.25
# How far out a number can lie in these units: float16 holds it.
FARTHEST = 2.0**15
LAZY = 64
# Rows of a table that are encoded at a time: with their windows and copies they take ten times their own memory.
AT_ONCE = 4096


@cache
def table() -> np.ndarray:
    """The value of each window, float16 (2^WINDOW,)."""
    count = 2**WINDOW
    quantile = NormalDist().inv_cdf
    values = np.array([quantile((i + 0.5) / count) for i in range(count)])
    return values[np.random.default_rng(0).permutation(count)].astype(np.float16)


@dataclass(frozen=True)
class Trellis:
    """A matrix W (rows, columns) as strings of symbols.

    Attributes:
        columns: of W.
        bits: uint8 (rows,), of a symbol.
        symbols: uint8 (rows, columns filled up to a multiple of GROUP), in the order of `order`.
        scales: float16 (rows,), what the values of the table are multiplied with.
        places: int64 (outliers, 2), row and column of the numbers that are stored apart.
        outliers: float16 (outliers,), these numbers over the scale of their row.
        table: whether the rows are entries of a table, whose matrix is the transpose.
    """

    columns: int
    bits: np.ndarray
    symbols: np.ndarray
    scales: np.ndarray
    places: np.ndarray
    outliers: np.ndarray
    table: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        groups = self.groups()
        order = self.order().nbytes if len(groups) > 1 else 0
        strings = sum(len(rows) * self.symbols.shape[1] * bits // 8 for bits, rows in groups)
        return strings + self.scales.nbytes + order + self.positions().nbytes + self.outliers.nbytes

    def groups(self) -> list[tuple[int, np.ndarray]]:
        """(bits, rows that have so many), fewest bits first."""
        return [(int(bits), np.flatnonzero(self.bits == bits)) for bits in np.unique(self.bits)]

    def order(self) -> np.ndarray:
        """Where each row stands when the groups are put behind each other."""
        behind = np.concatenate([rows for _, rows in self.groups()])
        return np.argsort(behind).astype(_index_type(len(behind)))

    def positions(self) -> np.ndarray:
        """`places` in the smallest type."""
        return self.places.astype(_index_type(max(len(self.bits), self.columns)))

    def packed(self, bits: int, rows: np.ndarray) -> np.ndarray:
        """The strings of a group: uint8 (rows, 1, bytes), the first symbol in the highest bits of the first byte."""
        planes = self.symbols[rows][..., None] >> np.arange(bits - 1, -1, -1, dtype=np.uint8) & 1
        return np.packbits(planes.reshape(len(rows), 1, -1), axis=-1)

    def dense(self) -> np.ndarray:
        """The float32 matrix that a runtime multiplies with; of a table, its transpose."""
        W = np.empty((len(self.bits), self.columns), np.float32)
        values = table().astype(np.float32)
        for bits, rows in self.groups():
            windows = np.zeros(self.symbols[rows].shape, np.int32)
            for back in range(-(-WINDOW // bits)):
                windows[:, back:] |= self.symbols[rows, : windows.shape[1] - back].astype(np.int32) << (back * bits)
            W[rows] = values[windows % 2**WINDOW][:, _positions(self.columns)]
        W[tuple(self.places.T)] = self.outliers
        W *= self.scales.astype(np.float32)[:, None]
        return W.T if self.table else W


def encode(W: np.ndarray, weights: np.ndarray, rate: float, passing: np.ndarray | None = None) -> Trellis:
    """The strings whose matrix comes near to W; needs the kernels.

    Args:
        W: (rows, columns), finite.
        weights: (rows,), what a squared error of each row costs.
        rate: bits per number that the rows have on average, at most.
        passing: as in `qexport.compression.quantize.quantize`: the error of a row is passed on to the rows below it. None
            for a table, whose entries are seen one by one.
    """
    W = W.astype(np.float32, copy=True)
    rows, columns = W.shape
    bits = spread_bits(weights * np.square(_root_mean_square(W)), rate)
    made = Trellis(
        columns,
        bits,
        np.zeros((rows, -(-columns // GROUP) * GROUP), np.uint8),
        np.empty(rows, np.float16),
        np.empty((0, 2), np.int64),
        np.empty(0, np.float16),
    )
    if passing is None:
        apart = np.zeros((rows, columns), bool)
        for count, chosen in made.groups():
            for part in np.array_split(chosen, -(-len(chosen) // AT_ONCE)):
                _, apart[part] = _encode_rows(W[part], part, count, made)
    else:
        apart = _encode_passing(W, passing, made)
    outliers = _over(W, made.scales)[apart].astype(np.float16)
    return replace(made, places=np.argwhere(apart), outliers=outliers, table=passing is None)


def spread_bits(importance: np.ndarray, rate: float) -> np.ndarray:
    """Bits for each row, `rate` on average at most: one bit more where an error costs four times as much, which makes the
    sum of what all errors cost least (reverse water-filling; Cover and Thomas, Elements of Information Theory, 10.3)."""
    need = 0.5 * np.log2(np.maximum(importance, importance.max() * 1e-9 + np.finfo(np.float64).tiny))
    low, high = LEAST_BITS - need.max() - 1, MOST_BITS - need.min() + 1
    for _ in range(60):
        middle = (low + high) / 2
        if _whole(need + middle).mean() <= rate:
            low = middle
        else:
            high = middle
    return _whole(need + low).astype(np.uint8)


def _whole(bits: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(bits), LEAST_BITS, MOST_BITS)


def _encode_passing(W: np.ndarray, passing: np.ndarray, made: Trellis) -> np.ndarray:
    """Row by row, each with what the rows above it have lost, which is added to W; the numbers that are stored apart."""
    apart = np.zeros(W.shape, bool)
    for lazy in range(0, len(W), LAZY):
        end = min(lazy + LAZY, len(W))
        errors = np.empty((end - lazy, W.shape[1]), np.float32)
        for k in range(lazy, end):
            found, apart[k] = _encode_rows(W[k : k + 1], np.array([k]), int(made.bits[k]), made)
            errors[k - lazy] = (W[k] - found[0]) / passing[k, k]
            W[k + 1 : end] -= np.outer(passing[k, k + 1 : end], errors[k - lazy])
        W[end:] -= passing[lazy:end, end:].T @ errors
    return apart


def _encode_rows(W: np.ndarray, rows: np.ndarray, bits: int, made: Trellis) -> tuple[np.ndarray, np.ndarray]:
    """Fill symbols and scales of `rows`, which are W; (what becomes of W, which numbers of it are stored apart)."""
    scales = np.maximum(_root_mean_square(W) / SPREAD[bits], np.abs(W).max(1) / FARTHEST)
    made.scales[rows] = np.minimum(scales, np.finfo(np.float16).max)
    x, values = _over(W, made.scales[rows]), table().astype(np.float32)
    far = np.abs(x) > values.max() + MARGIN
    exact = x[far].astype(np.float16)
    x[far] = np.nan
    filled = np.full((len(x), made.symbols.shape[1]), np.nan, np.float32)
    positions = _positions(made.columns)
    filled[:, positions] = x
    windows = kernels().trellis_encode(filled, table=values, bits=bits, threads=os.cpu_count() or 1)
    made.symbols[rows] = windows & (2**bits - 1)
    found = values[windows[:, positions]]
    found[far] = exact
    return found * made.scales[rows].astype(np.float32)[:, None], far


def _over(W: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """W over the scale of each row, 0 where that is 0."""
    step = scales.astype(np.float32)[:, None]
    return np.clip(np.divide(W, step, out=np.zeros_like(W), where=step != 0), -FARTHEST, FARTHEST)


def _root_mean_square(W: np.ndarray) -> np.ndarray:
    """Of each row, without what lies more than four times as far out."""
    size = np.abs(W)
    found = np.sqrt(np.square(size).mean(1))
    for _ in range(3):
        near = size <= 4 * found[:, None]
        found = np.sqrt((np.square(size) * near).sum(1) / np.maximum(near.sum(1), 1))
    return found


def _positions(columns: int) -> np.ndarray:
    """Position in its string of each column: a group of eight symbols is read as four pairs, and the first pairs of all
    groups are the first quarter of the columns (see `decoding`)."""
    groups = -(-columns // GROUP)
    return np.arange(groups * GROUP).reshape(groups, 4, 2).transpose(1, 0, 2).reshape(-1)[:columns]


def _index_type(count: int):
    return np.uint16 if count <= 2**16 else np.int32
