"""The forms that a weight can be stored in, what each takes in a file, and what each costs the layer's outputs."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qexport.compression import trellis
from qexport.compression.layers import LINEAR, TABLE, Layer
from qexport.compression.lowrank import LEFT_BLOCK, LowRank, Spectrum, apply_gram, factor, spectrum
from qexport.compression.quantize import BITS, BLOCKS, Quantized, error_passing, quantize
from qexport.compression.trains import BOND_DIMS, Train, encode, numbers
from qexport.compression.trellis import Trellis
from qexport.ops.kernels import kernels

KEEP, HALF, INTEGER, LOW_RANK, MPO, TRELLIS = "keep", "fp16", "int", "low-rank", "mpo", "trellis"
# Bits per number that strings are tried with.
RATES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
# Share of the numbers that are stored apart, as row, column and float16; a little more than was found in real models.
OUTLIERS = 0.001
# Shares of the numbers of a weight that low-rank factors are tried with.
KEPT = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.125, 0.1, 0.07, 0.05)
RANK_STEP = 16
# Names, attributes and the wrapping of a node and its weights, in bytes.
NODE = 400


@dataclass(frozen=True)
class Method:
    """How one weight is stored.

    Attributes:
        kind: keep, fp16, int (quantised), low-rank (two quantised factors), mpo (a train of cores in float16) or trellis
            (strings of symbols).
        bits, block: of the codes, and how many share a scale.
        rank: of the factors; bond dimension of a train.
        rate: bits per number of strings.
    """

    kind: str
    bits: int = 0
    block: int = 0
    rank: int = 0
    rate: float = 0.0

    def __str__(self) -> str:
        if self.kind in (KEEP, HALF):
            return "as it was" if self.kind == KEEP else "fp16"
        if self.kind == MPO:
            return f"mpo of bond dimension {self.rank}"
        if self.kind == TRELLIS:
            return f"trellis of {self.rate:g} bits"
        codes = f"int{self.bits} in blocks of {self.block}"
        return codes if self.kind == INTEGER else f"rank {self.rank}, {codes}"


@dataclass(frozen=True)
class Half:
    """A weight in float16, which the runtime turns into float32 when it loads the file."""

    matrix: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return self.matrix.nbytes

    def dense(self) -> np.ndarray:
        """The float32 matrix that a runtime multiplies with."""
        return self.matrix.astype(np.float32)


Form = Half | Quantized | LowRank | Train | Trellis


def methods(layer: Layer, allowed: tuple[str, ...]) -> list[Method]:
    """The methods that fit a layer, `keep` first.

    Args:
        allowed: of fp16, int8, trellis, int4, low-rank, mpo.
    """
    rows, columns = matrix_shape(layer)
    found = [Method(KEEP)]
    if HALF in allowed and layer.nbytes >= 4 * rows * columns:
        found.append(Method(HALF))
    found += [Method(INTEGER, bits, block) for bits in BITS if f"int{bits}" in allowed for block in _blocks(layer, rows)]
    if layer.is_stack:  # the others are made whole, or fitted to inputs that nothing sees
        return found
    if TRELLIS in allowed and kernels() is not None:
        found += [Method(TRELLIS, rate=rate) for rate in RATES]
    if LOW_RANK in allowed and len(layer.kinds) == 1:
        widths = [bits for bits in (8, 4) if f"int{bits}" in allowed] or [8]
        ranks = {round(share * rows * columns / (rows + columns) / RANK_STEP) * RANK_STEP for share in KEPT}
        ranks = sorted(rank for rank in ranks if RANK_STEP <= rank < min(rows, columns))
        found += [Method(LOW_RANK, bits, _common_block(rank), rank) for bits in widths for rank in ranks]
    if MPO in allowed and layer.kinds == (LINEAR,) and kernels() is not None:
        bonds = [bond for bond in BOND_DIMS if numbers(rows, columns, bond) < rows * columns / 4]
        found += [Method(MPO, rank=bond) for bond in bonds]
    return found


def _blocks(layer: Layer, rows: int) -> list[int]:
    """The blocks that a weight is quantised in. A table gives whole blocks, so that its width must be some."""
    return [block for block in BLOCKS if rows % block == 0 or not layer.picks]


def _common_block(rank: int) -> int:
    """The largest block that a rank is a multiple of."""
    return next(block for block in (64, 32, RANK_STEP) if rank % block == 0)


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """Shape of `layer.matrix()`, without reading it."""
    return layer.flat_shape[::-1] if layer.transposed or not layer.products else layer.flat_shape


@dataclass(frozen=True)
class Seen:
    """A layer's weight as its inputs see it: what the forms of it are fitted to. Computed once, for many forms.

    Args:
        layer: the layer.
        weights: Gram matrix of its inputs, or how much each entry of its table counts.
        target: of a product, the matrix (in, out) that is stored in place of the weight.
    """

    layer: Layer
    weights: np.ndarray
    target: np.ndarray | None = None

    @cached_property
    def matrix(self) -> np.ndarray:
        """What is stored, with inputs down its rows: (in, out), or (entries, width)."""
        if self.target is not None:
            return self.target
        return self.layer.matrix() if self.layer.products else self.layer.stored()

    @cached_property
    def spectrum(self) -> Spectrum:
        """What each rank keeps."""
        return spectrum(self.matrix, self.weights)

    @cached_property
    def passing(self) -> np.ndarray | None:
        """How rounding errors are passed on; None for a table, whose entries are seen one by one."""
        return error_passing(self.weights) if self.layer.products else None

    @cached_property
    def square(self) -> float:
        """|X W|^2."""
        return self._square(self.matrix)

    def make(self, method: Method) -> Form | None:
        """The weight by a method; None for `keep`."""
        if method.kind == KEEP:
            return None
        if method.kind == HALF:
            limit = np.finfo(np.float16).max
            return Half(np.clip(self._down, -limit, limit).astype(np.float16))
        if method.kind == INTEGER:
            return quantize(self._down, method.bits, method.block, self.passing)
        if method.kind == MPO:
            return encode(self.matrix, method.rank)
        if method.kind == TRELLIS:
            return trellis.encode(self.matrix, self._row_weights, method.rate, self.passing)
        return factor(self.matrix, self.weights, self.spectrum, method.rank, method.bits, method.block, self.passing)

    @property
    def _row_weights(self) -> np.ndarray:
        """What a squared error of each row of `matrix` costs, with what is passed on."""
        return self.weights if self.passing is None else 1 / np.square(np.diag(self.passing).astype(np.float64))

    @property
    def _down(self) -> np.ndarray:
        """What is stored, with codes in blocks down its columns: (in, out), or (width, entries)."""
        return self.matrix if self.layer.products else np.ascontiguousarray(self.matrix.T)

    def error(self, form: Form) -> float:
        """|X (W - W')|^2 / |X W|^2; of a table, entries count by their weights."""
        return self.error_of(form.dense() if self.layer.products else form.dense().T)

    def error_of(self, changed: np.ndarray) -> float:
        """The same of a matrix in the place of `matrix`."""
        return self._square(self.matrix - changed) / max(self.square, np.finfo(np.float64).tiny)

    def _square(self, W: np.ndarray) -> float:
        if self.layer.products:
            return float(np.vdot(W, apply_gram(self.weights, W.astype(np.float64))))
        return float(self.weights @ np.square(W).sum(1, dtype=np.float64))


def nbytes(layer: Layer, method: Method) -> int:
    """Bytes in a file that a method takes for a layer."""
    rows, columns = matrix_shape(layer)

    def codes(rows: int, columns: int, block: int) -> int:
        return -(-rows // block) * columns * (block * method.bits // 8 + 2)

    if method.kind == KEEP:
        return layer.nbytes
    if method.kind == HALF:
        return 2 * rows * columns + NODE
    if method.kind == MPO:
        return 2 * numbers(rows, columns, method.rank) + NODE
    if method.kind == INTEGER:
        return codes(rows, columns, method.block) + NODE
    if method.kind == TRELLIS:
        # behind the strings a scale and a place of each row, and the nodes of a few groups
        return math.ceil(rows * (columns * (method.rate / 8 + 6 * OUTLIERS) + 4)) + 4 * NODE
    if layer.kinds == (TABLE,):
        return codes(method.rank, columns, method.block) + codes(method.rank, rows, method.block) + 2 * NODE
    return codes(rows, method.rank, LEFT_BLOCK) + codes(method.rank, columns, method.block) + 2 * NODE
