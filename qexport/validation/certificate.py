"""The op's own estimate of its error beside the measured one.

`tree` tells for every batch item and head how far, by two independent half-samples of what it left out, its output is
from the exact one, relative to that head's output (docs/math.md). With w_bh = |c_bh|^2 the squared norm of the classical
output and e_bh the estimate, that of a head or of the whole site is sqrt(sum w e^2 / sum w) over its part of (b, h), as the
measured errors weigh. Rounding in low precision is no part of an estimate.
"""

from dataclasses import dataclass, field

import numpy as np

from qexport.validation.statistics import ErrorAccumulator

# Estimates come from samples: a head counts as covered up to this factor, a site is called wrong above the second one.
COVERED = 1.5
IMPLAUSIBLE = 3.0


@dataclass
class CertificateAccumulator:
    """Estimates of one site over batches and runs."""

    heads: int
    weight: np.ndarray = field(init=False)
    estimate: np.ndarray = field(init=False)

    def __post_init__(self):
        self.weight = np.zeros(self.heads)
        self.estimate = np.zeros(self.heads)

    def add(self, weights: np.ndarray, estimates: list[np.ndarray]) -> None:
        """Add one batch: squared norms of the classical output and, for each run, the op's estimates, all (batch, heads)."""
        for estimate in estimates:
            self.weight += weights.sum(axis=0)
            self.estimate += (weights * estimate.astype(np.float64) ** 2).sum(axis=0)

    def per_head(self) -> np.ndarray:
        """The estimate of each head."""
        return np.sqrt(_ratio(self.estimate, self.weight))

    def to_dict(self, errors: ErrorAccumulator, rounding: float) -> dict:
        """The JSON schema's `certificate` object.

        Args:
            errors: what was measured on the same values.
            rounding: relative error that the site's precision alone may cause.
        """
        measured, estimated = errors.head_errors(), self.per_head()
        worst = errors.worst_head()
        return {
            "relative_error": float(np.sqrt(_ratio(self.estimate.sum(), self.weight.sum()))),
            "worst_head": {"head": worst, "relative_error": float(estimated[worst])},
            "heads_covered": float(np.mean(measured <= COVERED * estimated + rounding)),
        }


def head_weights(value: np.ndarray, heads: int, padded: tuple[int, np.ndarray] | None) -> np.ndarray:
    """Squared norms (batch, heads) of an attention output, padded rows left out.

    Args:
        value: (batch, heads, positions, head_size) or (batch, positions, heads * head_size).
        padded: from `qexport.validation.unpadded.padded_axis`.
    """
    if value.ndim == 4:
        rows = (value.astype(np.float64) ** 2).sum(axis=3)
    else:
        rows = (value.reshape(*value.shape[:2], heads, -1).astype(np.float64) ** 2).sum(axis=3).swapaxes(1, 2)
    if padded is not None:
        rows = rows * padded[1][:, None, :]
    return rows.sum(axis=2)


def _ratio(numerator, denominator):
    return np.divide(numerator, denominator, out=np.zeros_like(np.asarray(numerator, float)), where=denominator != 0)
