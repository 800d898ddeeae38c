"""The level of noise up to which a loss stays within a tolerance, between the levels that were measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qexport.validation.statistics import confidence_interval

WITHIN, ABOVE, BELOW = "within the levels swept", "not within the levels swept", "never held"


def crossing(levels: Sequence[float], losses: Sequence[float], tolerance: float) -> float | None:
    """Where the loss first rises above the tolerance: the zero of the straight line between two levels.

    Args:
        levels: rising.
        losses: one per level.

    Returns:
        None when no loss is above it, or the first one is.
    """
    for i, loss in enumerate(losses):
        if loss <= tolerance:
            continue
        if i == 0:
            return None
        share = (tolerance - losses[i - 1]) / (loss - losses[i - 1])
        return float(levels[i - 1] + share * (levels[i] - levels[i - 1]))
    return None


def threshold(levels: Sequence[float], losses: np.ndarray, tolerance: float) -> dict:
    """The threshold of the mean over the seeds, and its 95 % interval where every seed has one.

    Args:
        losses: (levels, seeds).

    Returns:
        `level` (None unless `verdict` is WITHIN), `level_ci95` (None for one seed, or where a seed has no threshold) and
        `verdict`: WITHIN; ABOVE, no level breaks the model; BELOW, the lowest one does.
    """
    means = losses.mean(axis=1)
    level = crossing(levels, means, tolerance)
    verdict = WITHIN if level is not None else BELOW if means[0] > tolerance else ABOVE
    each = [crossing(levels, one, tolerance) for one in losses.T]
    interval = confidence_interval(each) if level is not None and None not in each else None
    return {"level": level, "level_ci95": list(interval) if interval else None, "verdict": verdict}
