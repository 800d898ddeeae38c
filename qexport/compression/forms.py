"""The forms that a weight can be stored in, what each takes in a file, and what each costs the layer's outputs."""

from dataclasses import dataclass

import numpy as np

from qexport.compression.layers import TABLE, Layer
from qexport.compression.lowrank import LowRank, Spectrum, apply_gram, factor
from qexport.compression.quantize import BITS, BLOCKS, Quantized, quantize

KEEP, HALF, INTEGER, LOW_RANK = "keep", "fp16", "int", "low-rank"
# Shares of the numbers of a weight that low-rank factors are tried with.
KEPT = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.125, 0.1, 0.07, 0.05)
RANK_STEP = 32
# Names, attributes and the wrapping of a node and its weights, in bytes.
NODE = 400


@dataclass(frozen=True)
class Method:
    """How one weight is stored.

    Attributes:
        kind: keep, fp16, int (quantised) or low-rank (two quantised factors).
        bits, block: of the codes, and how many share a scale.
        rank: of the factors.
    """

    kind: str
    bits: int = 0
    block: int = 0
    rank: int = 0

    def __str__(self) -> str:
        if self.kind in (KEEP, HALF):
            return "as it was" if self.kind == KEEP else "fp16"
        codes = f"int{self.bits} in blocks of {self.block}"
        return codes if self.kind == INTEGER else f"rank {self.rank}, {codes}"

    def to_dict(self) -> dict:
        """What the report holds."""
        return {key: value for key, value in self.__dict__.items() if value}


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


Form = Half | Quantized | LowRank


def methods(layer: Layer, allowed: tuple[str, ...]) -> list[Method]:
    """The methods that fit a layer, `keep` first.

    Args:
        allowed: of fp16, int8, int4, low-rank.
    """
    rows, columns = matrix_shape(layer)
    found = [Method(KEEP)]
    if HALF in allowed and layer.nbytes >= 4 * rows * columns:
        found.append(Method(HALF))
    # a table gives whole blocks, so that its width must be some
    fitting = [block for block in BLOCKS if rows % block == 0 or not layer.picks]
    found += [Method(INTEGER, bits, block) for bits in BITS if f"int{bits}" in allowed for block in fitting]
    if LOW_RANK in allowed and len(layer.kinds) == 1:
        widths = [bits for bits in (8, 4) if f"int{bits}" in allowed] or [8]
        ranks = {round(share * rows * columns / (rows + columns) / RANK_STEP) * RANK_STEP for share in KEPT}
        ranks = sorted(rank for rank in ranks if RANK_STEP <= rank < min(rows, columns))
        found += [Method(LOW_RANK, bits, 64 if rank % 64 == 0 else 32, rank) for bits in widths for rank in ranks]
    return found


def matrix_shape(layer: Layer) -> tuple[int, int]:
    """Shape of `layer.matrix()`, without reading it."""
    return layer.shape[::-1] if layer.transposed or not layer.products else layer.shape


def make(layer: Layer, method: Method, weights: np.ndarray, found: Spectrum | None = None) -> Form | None:
    """Store a layer's weight by a method; None for `keep`.

    Args:
        weights: Gram matrix of the layer's inputs, or how often each entry of a table is picked.
        found: the layer's spectrum, for low-rank factors.
    """
    if method.kind == KEEP:
        return None
    if method.kind == HALF:
        limit = np.finfo(np.float16).max
        return Half(np.clip(layer.matrix(), -limit, limit).astype(np.float16))
    if method.kind == INTEGER:
        return quantize(layer.matrix(), method.bits, method.block, weights if weights.ndim == 2 else None)
    W = layer.stored() if layer.kinds == (TABLE,) else layer.matrix()
    return factor(W, weights, found, method.rank, method.bits, method.block)


def nbytes(layer: Layer, method: Method) -> int:
    """Bytes in a file that a method takes for a layer."""
    rows, columns = matrix_shape(layer)

    def codes(rows: int, columns: int) -> int:
        blocks = -(-rows // method.block)
        return blocks * columns * (method.block * method.bits // 8 + 2)

    if method.kind == KEEP:
        return layer.nbytes
    if method.kind == HALF:
        return 2 * rows * columns + NODE
    if method.kind == INTEGER:
        return codes(rows, columns) + NODE
    if layer.kinds == (TABLE,):
        return codes(method.rank, columns) + codes(method.rank, rows) + 2 * NODE
    return codes(rows, method.rank) + codes(method.rank, columns) + 2 * NODE


def output_error(layer: Layer, form: Form, weights: np.ndarray) -> float:
    """|X (W - W')|^2 / |X W|^2 over the inputs behind `weights`; of a table, entries count as often as they are picked."""
    W = layer.stored() if weights.ndim == 1 else layer.matrix()
    changed = form.dense()
    E = W - (changed.T if weights.ndim == 1 else changed)
    return _square(E, weights) / max(_square(W, weights), np.finfo(np.float64).tiny)


def _square(W: np.ndarray, weights: np.ndarray) -> float:
    return float(np.vdot(W.astype(np.float64), apply_gram(weights, W.astype(np.float64))))
