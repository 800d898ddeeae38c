"""Weights as whole numbers of 4 or 8 bits with a scale per block, and the rounding that the inputs make least harmful."""

from dataclasses import dataclass

import numpy as np

BITS = (8, 4)
BLOCKS = (32, 64, 128)
# Scales that are tried for a block, as shares of the one that reaches its largest number: clipping a few numbers can cost
# less than a coarser step for all.
SHRINK = np.linspace(1.0, 0.7, 7)
# Added to the diagonal of a Gram matrix, as a share of its mean: directions that the inputs never use are held still. More
# of it costs a little on inputs like those that are fitted to, and saves more on others.
DAMPING = 0.03
LAZY = 64


@dataclass(frozen=True)
class Quantized:
    """A matrix W (rows, columns) as codes: W[k, n] ~ (codes[k, n] - 2^(bits - 1)) scales[k // block, n].

    Attributes:
        codes: uint8 (rows, columns), below 2^bits.
        scales: float16 (ceil(rows / block), columns), of either sign.
        bits, block: 4 or 8; rows that share a scale.
    """

    codes: np.ndarray
    scales: np.ndarray
    bits: int
    block: int

    @property
    def nbytes(self) -> int:
        """Bytes in a file: codes packed, rows filled up to whole blocks."""
        return self.scales.shape[0] * self.block * self.codes.shape[1] * self.bits // 8 + self.scales.nbytes

    def dense(self) -> np.ndarray:
        """The float32 matrix that a runtime multiplies with."""
        scales = np.repeat(self.scales.astype(np.float32), self.block, axis=0)[: len(self.codes)]
        return (self.codes.astype(np.float32) - 2 ** (self.bits - 1)) * scales

    def packed(self) -> np.ndarray:
        """The codes as MatMulNBits takes them: uint8 (columns, blocks, block * bits / 8), the lower bits first."""
        blocks, columns = self.scales.shape
        padded = np.full((blocks * self.block, columns), 2 ** (self.bits - 1), np.uint8)
        padded[: len(self.codes)] = self.codes
        by_block = padded.T.reshape(columns, blocks, self.block)
        return by_block if self.bits == 8 else by_block[..., ::2] | by_block[..., 1::2] << 4


def quantize(W: np.ndarray, bits: int, block: int, passing: np.ndarray | None = None) -> Quantized:
    """Round a matrix to `bits`, block by block down each column.

    With `passing` the rounding error of a row is passed on to the rows below it, such that |X (W - W')| becomes small and
    not |W - W'| (GPTQ; Frantar et al., ICLR 2023).

    Args:
        W: (rows, columns), of a product X W.
        bits: 4 or 8.
        block: rows that share a scale.
        passing: `error_passing` of the inputs of that product; None to round each number by itself.
    """
    rows, columns = W.shape
    weights = W.astype(np.float32, copy=True)
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((-(-rows // block), columns), np.float16)
    zero, top = 2 ** (bits - 1), 2**bits - 1
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        scale = scales[start // block] = _scales(weights[start:stop], bits)
        step = scale.astype(np.float32)
        inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
        for lazy in range(start, stop, LAZY):
            end = min(lazy + LAZY, stop)
            errors = np.empty((end - lazy, columns), np.float32)
            for k in range(lazy, end):
                codes[k] = code = np.clip(np.rint(weights[k] * inverse) + zero, 0, top)
                if passing is not None:
                    errors[k - lazy] = (weights[k] - (code - zero) * step) / passing[k, k]
                    weights[k + 1 : end] -= np.outer(passing[k, k + 1 : end], errors[k - lazy])
            if passing is not None:
                weights[end:] -= passing[lazy:end, end:].T @ errors
    return Quantized(codes, scales, bits, block)


def error_passing(gram: np.ndarray) -> np.ndarray:
    """How an error of row k is passed on, row k of the upper Cholesky factor U of the inverse of X^T X, U^T U: float32
    (rows, rows).

    Args:
        gram: X^T X (rows, rows); a little is added to its diagonal.
    """
    damped = gram + DAMPING * max(np.trace(gram) / len(gram), np.finfo(np.float32).tiny) * np.eye(len(gram))
    lower = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1].T  # damped = lower.T lower, lower triangular
    # In order: products of what lies backwards in memory are none of BLAS, which is many times as fast.
    return _inverse(np.ascontiguousarray(lower)).astype(np.float32).T


def _inverse(lower: np.ndarray) -> np.ndarray:
    """The inverse of a lower triangular matrix, by halves: a fifth of numpy's time, which does not know zeros."""
    half = len(lower) // 2
    if half < 32:
        return np.linalg.inv(lower)
    found = np.zeros_like(lower)
    found[:half, :half] = _inverse(lower[:half, :half])
    found[half:, half:] = _inverse(lower[half:, half:])
    found[half:, :half] = -found[half:, half:] @ (lower[half:, :half] @ found[:half, :half])
    return found


def _scales(block: np.ndarray, bits: int) -> np.ndarray:
    """The scale of each column that rounds it best. A scale has the sign that gives the largest number the code 0, the one
    code without a counterpart."""
    zero, top = 2 ** (bits - 1), 2**bits - 1
    largest = np.take_along_axis(block, np.abs(block).argmax(0)[None], 0)[0]
    best, least = np.zeros(block.shape[1], np.float16), np.full(block.shape[1], np.inf)
    limit = np.finfo(np.float16).max
    for share in SHRINK:
        scale = np.clip(-share * largest / zero, -limit, limit).astype(np.float16)
        step = scale.astype(np.float32)
        inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
        rounded = (np.clip(np.rint(block * inverse) + zero, 0, top) - zero) * step
        error = np.square(block - rounded).sum(0)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best
