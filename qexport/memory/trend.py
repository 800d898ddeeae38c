"""Does memory grow, how fast, and will it stop? Statistics of readings y (bytes) at x (number of the call, or seconds).

Readings are correlated: garbage waits for its collector, an allocator keeps what it got. Both parts correct for it by the
integrated autocorrelation time of the residuals, tau = 1 + 2 sum_k rho_k, summed up to the window of Sokal (1997), the first
M >= 5 tau(M): n readings are worth n / tau independent ones.

Trend. The readings behind the warm-up (the first quarter) are cut into batches of at least 2 tau, and the slope is the
median of the slopes between their medians (Theil 1950, Sen 1968). Its interval lies between the order statistics of these
slopes that the distribution of Kendall's S names.

Leak. "Memory grew" is no leak: loading, a warm-up and a cache that fills grow as well, and stop. So the claim is the
strongest one that readings can refute: memory grew in the second, in the third AND in the last quarter of the calls, and in
their last eighth (and last eight readings). Each part is tested by itself against no growth. The readings of a part are cut
into up to fifty batches of four or more, and the minimum of each is taken, which drops what is in use for a moment only;
with the least-squares slope b of the minima,

    t = b / se,    se^2 = tau s^2 / sum (x - mean x)^2,    n / tau - 2 degrees of freedom, Student's t.

The p-value of the claim is the largest of the four (an intersection-union test, Berger 1982): four tests need no correction
of its level, which is far below the nominal one where the parts are independent. Three limits keep honest programs out: less
than `LEAST_RATE` bytes a call is nobody's leak, nor is less in all than a counter of pages grows by while allocators use for
the first time what they hold; and growth whose rate in the last quarter, or eighth, is less than half of that in the second
quarter is a cache that fills. One that has not slowed down yet is told from a leak by more calls alone.
"""

import math
from dataclasses import asdict, dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

LEVEL = 0.01  # of the leak test of a block, over all of its counters
MIN_READINGS = 8  # of each part that the leak test looks at: 32 calls
LEAST_RATE = 16.0  # bytes a call: the size of the smallest object in Python
SLOWING = 0.5
BATCHES = 50  # of one part of the leak test
TREND_BATCHES = 64

LEAK = "leak"
NONE = "no leak"
SLOWING_DOWN = "slows down"
GARBAGE = "garbage"
TOO_FEW = "too few readings"


@dataclass
class LeakTest:
    """What the readings of one counter say.

    Attributes:
        verdict: "leak", "no leak", "slows down" (growth that dies away: a warm-up, a cache that fills), "garbage" (growth
            that a garbage collection gave back) or "too few readings".
        p_value: of no growth in at least one of the four parts; None with too few readings.
        bytes_per_call: growth in the second, third and last quarter of the calls, empty with too few readings.
    """

    verdict: str
    p_value: float | None
    bytes_per_call: list[float]

    def to_dict(self) -> dict:
        """As plain data."""
        return asdict(self)


def autocorrelation_time(residuals: np.ndarray) -> float:
    """tau of residuals around a trend, at least 1; 1 where they do not vary."""
    centred = residuals - residuals.mean()
    n = len(centred)
    spectrum = np.fft.rfft(centred, 2 * n)
    covariance = np.fft.irfft(spectrum * spectrum.conj())[:n]
    # what is left of a straight line by rounding is no correlation
    if covariance[0] <= n * (1e-9 * max(1.0, float(np.abs(residuals).max()))) ** 2:
        return 1.0
    taus = 2 * np.cumsum(covariance / covariance[0]) - 1
    window = np.flatnonzero(np.arange(n) >= 5 * taus)
    return max(1.0, float(taus[window[0] if len(window) else n - 1]))


def slope_test(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Least-squares slope of y over x, and the p-value of "it is not above 0", corrected for autocorrelation."""
    x, y = x - x.mean(), y - y.mean()
    spread = float(x @ x)
    slope = float(x @ y) / spread
    residuals = y - slope * x
    tau = autocorrelation_time(residuals)
    freedom = len(x) / tau - 2
    if slope <= 0 or freedom <= 0:
        return slope, 1.0
    variance = tau * float(residuals @ residuals) / (len(x) - 2) / spread
    from qexport.validation.statistics import t_survival  # whose package needs onnx, which a profile does not

    return slope, t_survival(slope / math.sqrt(variance), freedom) if variance > 0 else 0.0


def leak_test(x, y, calls: int, least_growth: int = 0) -> LeakTest:
    """Whether y (bytes in use after call number x of 1..calls) grows by `least_growth` or more behind the first quarter, and
    does not stop; the head of this file says how that is decided."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    # by the number of the call, since not every call may have been read
    bounds = np.searchsorted(x, [calls / 4, calls / 2, 3 * calls / 4, 7 * calls / 8], side="right")
    starts = [*bounds[:3], min(bounds[3], len(x) - MIN_READINGS)]
    ends = [bounds[1], bounds[2], len(x), len(x)]
    if min(np.subtract(ends, starts)) < MIN_READINGS:
        return LeakTest(TOO_FEW, None, [])
    tests = []
    for a, b in zip(starts, ends, strict=True):
        batches = min(BATCHES, max(MIN_READINGS, (b - a) // 4))
        tests.append(slope_test(*_batched(x[a:b], y[a:b], batches, np.min)))
    rates = [slope for slope, _ in tests[:3]]
    p_value = max(p for _, p in tests)
    if p_value >= LEVEL or min(rates) < LEAST_RATE or float(np.mean(rates)) * 3 / 4 * calls < least_growth:
        return LeakTest(NONE, p_value, rates)
    at_end = min(slope for slope, _ in tests[2:])
    return LeakTest(SLOWING_DOWN if at_end < SLOWING * rates[0] else LEAK, p_value, rates)


def _batched(x, y, batches: int, summary) -> tuple[np.ndarray, np.ndarray]:
    """x and y in at most so many batches of equal length, the first ones of them dropped: mean of x, `summary` of y."""
    length = -(-len(x) // batches)
    count = len(x) // length
    x, y = (values[len(values) - count * length :].reshape(count, length) for values in (x, y))
    return x.mean(1), summary(y, axis=1)


def theil_sen(x, y) -> dict:
    """Slope of y over x with its 95 % interval: {"slope", "ci95", "readings"}; the slope is None for fewer than eight
    readings, the interval where they are worth fewer than six independent ones."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    result = {"slope": None, "ci95": None, "readings": len(x)}
    x, y = x[len(x) // 4 :], y[len(y) // 4 :]
    if result["readings"] < 8 or x[0] == x[-1]:
        return result
    slope, offset = np.polyfit(x - x[0], y, 1)
    tau = autocorrelation_time(y - slope * (x - x[0]) - offset)
    bx, by = _batched(x, y, max(6, min(TREND_BATCHES, int(len(x) / (2 * tau)))), np.median)
    i, j = np.triu_indices(len(bx), 1)
    slopes = np.sort((by[j] - by[i]) / (bx[j] - bx[i]))
    result["slope"] = float(np.median(slopes))
    from qexport.validation.statistics import CONFIDENCE  # whose package needs onnx, which a profile does not

    margin = kendall_quantile(len(bx), (1 + CONFIDENCE) / 2)
    low = -1 if margin is None else (len(slopes) - margin) // 2 - 1
    if low >= 0 and len(x) >= 6 * tau:
        result["ci95"] = [float(slopes[low]), float(slopes[len(slopes) - 1 - low])]
    return result


@cache
def kendall_quantile(n: int, probability: float) -> int | None:
    """The least s with P(S <= s) >= probability for Kendall's S of n independent values without ties, s < n (n - 1) / 2:
    the sum of independent steps, by the recursion of Mann (1945) up to 30 values and the normal distribution above; None
    where so few values cannot reach it."""
    pairs = n * (n - 1) // 2
    if n > 30:
        sd = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
        return math.ceil(NormalDist().inv_cdf(probability) * sd)
    counts = np.ones(1)  # of permutations by their number of inversions
    for k in range(2, n + 1):
        counts = np.convolve(counts, np.full(k, 1 / k))
    for inversions in range(pairs, 0, -1):  # S = pairs - 2 * inversions
        s = pairs - 2 * inversions
        if counts[inversions:].sum() >= probability:
            return s
    return None
