"""Softmax attention in float64, on all queries or on some, errors against it, and the error that nobody can beat."""

from statistics import NormalDist

import numpy as np

ROWS = 1024  # queries that a reference computes at most; evenly spaced, the last one among them


def rows_of(n: int, limit: int = ROWS) -> np.ndarray:
    """The queries that are compared, at most `limit` of 0 .. n - 1."""
    return np.unique(np.linspace(0, n - 1, min(n, limit)).round().astype(int))


def attention(q, k, v, rows, causal: bool) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) v in float64 for the queries `rows`; (..., len(rows), d); causal: q and k end together."""
    out = np.empty((*q.shape[:-2], len(rows), v.shape[-1]))
    allowed = np.arange(k.shape[-2]) <= rows[:, None] + (k.shape[-2] - q.shape[-2])
    for head in np.ndindex(*q.shape[:-2]):
        scores = q[head][rows].astype(np.float64) @ k[head].astype(np.float64).T / q.shape[-1] ** 0.5
        if causal:
            scores[~allowed] = -np.inf
        np.exp(scores - scores.max(-1, keepdims=True), out=scores)
        out[head] = scores @ v[head].astype(np.float64) / scores.sum(-1, keepdims=True)
    return out


def head_errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Relative Frobenius error of each head, (..., heads), from two (..., heads, rows, d); no number where a head is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.linalg.norm(found - expected, axis=(-2, -1)) / np.linalg.norm(expected, axis=(-2, -1))


def gaussian_bound(samples: int, n: int) -> float:
    """Least relative error for scores ~ N(0, 1) and independent values when S of n value rows are read and nothing is known
    of the others, n large: error^2 >= Phi(t - 2) with 1 - Phi(t) = S / n (docs/math.md)."""
    normal = NormalDist()
    return 0.0 if samples >= n else normal.cdf(normal.inv_cdf(1 - samples / n) - 2) ** 0.5
