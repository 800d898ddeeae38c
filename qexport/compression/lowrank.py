"""Low-rank factors of weights, as their inputs see them.

With G = X^T X the best W' of rank r for the outputs, min |X (W - W')|, projects W on the r leading eigenvectors V of
W^T G W: W' = W V V^T, and |X (W - W')|^2 is the sum of the eigenvalues left out. (The truncated SVD of the whitened weight,
as in SVD-LLM, Wang et al., ICLR 2025; written this way it needs no inverse of G.)
"""

from dataclasses import dataclass

import numpy as np

from qexport.compression.quantize import DAMPING, Quantized, error_passing, quantize

# Inputs are many where a rank is small, so that their scales need not be.
LEFT_BLOCK = 128


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of W^T G W, largest first, with their vectors (columns, values); `total` is |X W|^2."""

    values: np.ndarray
    vectors: np.ndarray
    total: float

    def errors(self) -> np.ndarray:
        """Relative squared error |X (W - W')|^2 / |X W|^2 of each rank 0, 1, 2, .."""
        left = np.append(np.cumsum(self.values[::-1])[::-1], 0.0)
        return left / max(self.total, np.finfo(np.float64).tiny)


def spectrum(W: np.ndarray, weights: np.ndarray) -> Spectrum:
    """What each rank keeps of the outputs.

    Args:
        W: (rows, columns).
        weights: the Gram matrix (rows, rows) of the inputs; or (rows,), how often each row of a table is picked.
    """
    W = W.astype(np.float64)
    rows, columns = W.shape
    if columns <= rows:
        values, vectors = np.linalg.eigh(W.T @ apply_gram(weights, W))
    else:
        root = np.linalg.cholesky(_full(weights))
        seen = root.T @ W
        values, left = np.linalg.eigh(seen @ seen.T)
        kept = values > values[-1] * rows * np.finfo(np.float64).eps  # the others are rounding, of no direction
        vectors = seen.T @ left * np.divide(1, np.sqrt(np.maximum(values, 0.0)), out=np.zeros(rows), where=kept)
    values = np.maximum(values[::-1], 0.0)
    return Spectrum(values, np.ascontiguousarray(vectors[:, ::-1]), float(values.sum()))


@dataclass(frozen=True)
class LowRank:
    """W ~ left right, both quantised; the left factor of a table is stored by entry: `left` then holds its transpose."""

    left: Quantized
    right: Quantized
    table: bool

    @property
    def rank(self) -> int:
        """The common dimension."""
        return len(self.right.codes)

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return self.left.nbytes + self.right.nbytes

    def dense(self) -> np.ndarray:
        """W (rows, columns); of a table, (width, entries)."""
        left, right = self.left.dense(), self.right.dense()
        return right.T @ left if self.table else left @ right


def factor(
    W: np.ndarray, weights: np.ndarray, found: Spectrum, rank: int, bits: int, block: int, passing: np.ndarray | None
) -> LowRank:
    """Quantised factors of W. The left one is rounded first; the right one is then fitted to what is left of it.

    Args:
        W, weights: as for `spectrum`, which `found` is from.
        rank: at least 1, at most the smaller side of W.
        bits: of both factors; see `quantize`.
        block: down the common dimension; the left factor of a product has blocks of LEFT_BLOCK.
        passing: `error_passing` of a Gram matrix; None for a table.
    """
    table = weights.ndim == 1
    left = (W @ found.vectors[:, :rank]).astype(np.float32)
    rounded = quantize(np.ascontiguousarray(left.T), bits, block) if table else quantize(left, bits, LEFT_BLOCK, passing)
    kept = (rounded.dense().T if table else rounded.dense()).astype(np.float64)
    seen = apply_gram(weights, kept)
    gram = kept.T @ seen
    floor = DAMPING**2 * max(np.trace(gram) / rank, np.finfo(np.float32).tiny)
    right = np.linalg.solve(gram + floor * np.eye(rank), seen.T @ W.astype(np.float64))
    return LowRank(rounded, quantize(right.astype(np.float32), bits, block, error_passing(gram)), table)


def apply_gram(weights: np.ndarray, W: np.ndarray) -> np.ndarray:
    """G W, with G the Gram matrix or the diagonal of `weights`."""
    return weights[:, None] * W if weights.ndim == 1 else weights @ W


def _full(weights: np.ndarray) -> np.ndarray:
    gram = np.diag(weights) if weights.ndim == 1 else weights
    return gram + DAMPING**2 * max(np.trace(gram) / len(gram), np.finfo(np.float32).tiny) * np.eye(len(gram))
