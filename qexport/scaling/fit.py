"""How time grows with length: the exponent of a power law, with its confidence interval."""

import numpy as np

from qexport.validation.statistics import CONFIDENCE, t_quantile


def power_law(lengths, times) -> dict | None:
    """The exponent a of times ~ c n^a by least squares of y = log time on x = log n; None for fewer than two lengths.

    With k lengths, x' = x - mean x and residuals e = y - log c - a x:

        a = sum x' y / sum x'^2        s^2 = sum e^2 / (k - 2)        interval: a +- t s / sqrt(sum x'^2)

    where t is the 97.5 % quantile of Student's t with k - 2 degrees of freedom (Draper and Smith, Applied Regression
    Analysis, section 1.4). The interval takes the deviations from the line for independent noise of one size. Where they
    are not, since a program changes its way with n, it is wide, and a is no more than the mean slope over these lengths.

    Returns:
        `exponent`; `ci95`, two numbers, None for two lengths; `last_exponent`, the slope between the last two lengths,
        which says where a curve is going; `factor`, c in the unit of the times; `spread`, exp(s), by which factor times lie
        off the line, None for two lengths; `lengths`, as given.
    """
    x, y = np.log(np.asarray(lengths, float)), np.log(np.asarray(times, float))
    count = len(x)
    if count < 2:
        return None
    centred = x - x.mean()
    squares = float(centred @ centred)
    exponent = float(centred @ y) / squares
    offset = float(y.mean() - exponent * x.mean())
    ci95 = spread = None
    if count > 2:
        residuals = y - offset - exponent * x
        s = float(residuals @ residuals / (count - 2)) ** 0.5
        half = t_quantile((1 + CONFIDENCE) / 2, count - 2) * s / squares**0.5
        ci95, spread = [exponent - half, exponent + half], float(np.exp(s))
    last = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
    found = {"exponent": exponent, "ci95": ci95, "last_exponent": last, "factor": float(np.exp(offset)), "spread": spread}
    return found | {"lengths": [int(n) for n in lengths]}


def predicted(rows: list[tuple[int, float]], n: int, fit: dict | None) -> float | None:
    """A value at length n from (length, value) at shorter ones: as it grows by the fit or between the last two, whichever
    is steeper, or with the square where there is no fit; None without a value."""
    if not rows:
        return None
    last, value = rows[-1]
    return value * (n / last) ** (max(fit["exponent"], fit["last_exponent"]) if fit else 2.0)
