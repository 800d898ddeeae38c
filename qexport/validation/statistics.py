"""Statistics of a stochastic model against its baseline: errors over seeds, confidence intervals, bias against variance.

An `ErrorAccumulator` sees the baseline's values c and, for N seeds, the values y_1..y_N of one graph value, batch by
batch. It keeps inner products only, so memory does not grow with the data: with d_i = y_i - c taken over all batches as
one long vector, G_ij = <d_i, d_j>, <d_i, c> and |c|^2 give every figure below.

    relative error of seed i    |d_i| / |c|                                       (relative Frobenius error)
    cosine of seed i            <y_i, c> / (|y_i| |c|),  <y_i, c> = |c|^2 + <d_i, c>
    mean deviation              m = 1/N sum d_i,  |m|^2 = sum_ij G_ij / N^2
    variance of one run         s^2 = sum_i |d_i - m|^2 / (N - 1)
    bias^2                      |m|^2 - s^2 / N, the mean of <d_i, d_j> over i != j: unbiased for |E d|^2

Test of "no bias". Seeds are the independent replicates; elements are not, the neurons of one output move together. Let S be
the covariance matrix of one run. Without bias the products <d_i, d_j>, i < j, have mean 0, variance tr S^2, and are
uncorrelated, whatever S is (the statistic of Chen and Qin 2010). Their Student's t statistic has nearly that distribution
when many directions of S count, and is skewed like chi^2_d - d when few do, d = (tr S^2)^3 / (tr S^3)^2 (matching three
cumulants, Hall 1983, Zhang 2005). So with p_t Student's p-value and z its normal quantile

    p = P(chi^2_d > d + sqrt(2 d) z).

The traces are estimated from the Gram matrix of the centred runs without bias (moments of the Wishart distribution), which
takes 4 seeds. tests/test_error_statistics.py holds the level of the test for spectra of S from flat to 1 / i^2.
"""

import math
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

BIAS_LEVEL = 0.01
CONFIDENCE = 0.95
CHUNK = 2**20
MIN_SEEDS_FOR_BIAS = 4
# Above so many degrees of freedom chi^2 is as good as normal.
MANY = 1e4

EXACT = "exact"
SAMPLING = "within sampling error"
SYSTEMATIC = "systematic"
TOO_FEW = "too few seeds"
ESTIMATED = "as estimated"


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by Lentz's continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1 / max(1 - (a + b) * x / (a + 1), tiny)
    total = d
    for m in range(1, 100_000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + step * d or tiny)
            c = 1 + step / c or tiny
            total *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return min(1.0, front * total)


def f_survival(f: float, k1: float, k2: float) -> float:
    """P(F > f) for the F distribution with k1 and k2 degrees of freedom."""
    if f <= 0:
        return 1.0
    if math.isinf(f):
        return 0.0
    return incomplete_beta(k2 / 2, k1 / 2, k2 / (k2 + k1 * f))


def t_survival(t: float, freedom: int) -> float:
    """P(T > t) for Student's t."""
    half = f_survival(t * t, 1, freedom) / 2
    return half if t > 0 else 1 - half


def chi2_survival(x: float, freedom: float) -> float:
    """P(chi^2 > x): the regularised upper incomplete gamma function Q(freedom / 2, x / 2) (DLMF 8.11.4 and 8.9.2)."""
    a, x = freedom / 2, x / 2
    if x <= 0:
        return 1.0
    front = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        for n in range(1, 100_000):
            term *= x / (a + n)
            total += term
            if term < total * 1e-15:
                break
        return max(0.0, 1 - front * total)
    b, d = x + 1 - a, 1 / (x + 1 - a)
    c, total = 1e300, 1 / (x + 1 - a)
    for n in range(1, 100_000):
        b += 2
        step = -n * (n - a)
        d = 1 / (step * d + b or 1e-300)
        c = b + step / c or 1e-300
        total *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return min(1.0, front * total)


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t at `probability` >= 1/2, by bisection on t^2 ~ F(1, freedom)."""
    low, high = 0.0, 1.0
    tail = 2 * (1 - probability)
    while f_survival(high * high, 1, freedom) > tail:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if f_survival(middle * middle, 1, freedom) > tail else (low, middle)
    return (low + high) / 2


def confidence_interval(values) -> tuple[float, float] | None:
    """The 95 % confidence interval of the mean of independent values (Student's t); None for fewer than two."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return None
    half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


@dataclass
class ErrorAccumulator:
    """Errors of N runs of one value against its baseline, summed over batches; see the page's head for the formulas.

    `heads` > 0 also keeps the error of each attention head; CHUNK bounds the float64 copies that it makes.
    """

    runs: int
    heads: int = 0
    elements: int = 0
    gram: np.ndarray = field(init=False)
    cross: np.ndarray = field(init=False)
    base: float = 0.0
    max_abs: np.ndarray = field(init=False)
    head_error: np.ndarray = field(init=False)
    head_base: np.ndarray = field(init=False)

    def __post_init__(self):
        self.gram = np.zeros((self.runs, self.runs))
        self.cross = np.zeros(self.runs)
        self.max_abs = np.zeros(self.runs)
        self.head_error = np.zeros(self.heads)
        self.head_base = np.zeros(self.heads)

    def add(self, baseline: np.ndarray, values: list[np.ndarray]) -> None:
        """Add one batch, CHUNK elements at a time.

        Args:
            baseline: the baseline's values, any shape; (heads, elements) when `heads` > 0.
            values: one array of that shape per run.
        """
        lead = self.heads or 1
        baseline, values = baseline.reshape(lead, -1), [value.reshape(lead, -1) for value in values]
        width = max(CHUNK // lead, 1)
        for start in range(0, baseline.shape[1], width):
            part = slice(start, start + width)
            c = baseline[:, part].astype(np.float64)
            self._add_part(c, np.stack([value[:, part].astype(np.float64) - c for value in values]))

    def _add_part(self, c: np.ndarray, deviations: np.ndarray) -> None:
        flat = deviations.reshape(self.runs, -1)
        self.elements += flat.shape[1]
        self.gram += flat @ flat.T
        self.cross += flat @ c.ravel()
        self.base += float(np.vdot(c, c))
        # maximum keeps NaN, so a broken run cannot pass
        self.max_abs = np.maximum(self.max_abs, np.abs(flat).max(axis=1))
        if self.heads:
            self.head_base += (c**2).sum(axis=1)
            self.head_error += (deviations**2).sum(axis=(0, 2))

    def relative_errors(self) -> np.ndarray:
        """|d_i| / |c| of each run; 0 / 0 is 0."""
        return _ratio(np.sqrt(np.diag(self.gram)), math.sqrt(self.base))

    def cosines(self) -> np.ndarray:
        """Cosine of y_i and c of each run; 1 where both are zero."""
        norms = np.sqrt(np.maximum(self.base + 2 * self.cross + np.diag(self.gram), 0)) * math.sqrt(self.base)
        both_zero = (self.base == 0) & (np.diag(self.gram) == 0)
        return np.where(both_zero, 1.0, np.clip(_ratio(self.base + self.cross, norms), -1, 1))

    def metrics(self, rounding: float, level: float = BIAS_LEVEL) -> dict:
        """The figures of the JSON schema's `metrics` object.

        Args:
            rounding: relative error that the element type's rounding alone may cause.
            level: significance level of the test for bias.
        """
        errors = self.relative_errors()
        interval = confidence_interval(errors) if np.isfinite(errors).all() else None
        result = {
            "relative_error": float(errors.mean()),
            "relative_error_ci95": list(interval) if interval else None,
            "relative_error_per_seed": [float(e) for e in errors],
            "cosine": float(self.cosines().mean()),
            "max_abs_error": float(self.max_abs.max()) if len(self.max_abs) else 0.0,
            "elements": self.elements,
            "bias": self.bias(rounding, level),
        }
        if self.heads:
            worst = self.worst_head()
            result["worst_head"] = {"head": worst, "relative_error": float(self.head_errors()[worst])}
        return result

    def head_errors(self) -> np.ndarray:
        """Relative error of each head, root mean square over the runs."""
        return _ratio(np.sqrt(self.head_error / self.runs), np.sqrt(self.head_base))

    def worst_head(self) -> int:
        """The head with the largest error; one that is not finite is worse than any."""
        return int(np.argmax(np.nan_to_num(self.head_errors(), nan=np.inf)))

    def bias(self, rounding: float, level: float = BIAS_LEVEL) -> dict:
        """Bias against variance, both relative to |c|, with the test's figures and its verdict."""
        n, norm = self.runs, math.sqrt(self.base)
        errors = self.relative_errors()
        mean_sq = float(self.gram.sum()) / n**2
        answer = {"relative_bias": None, "relative_std": None, "p_value": None, "reference_freedom": None, "level": level}
        if not np.isfinite(errors).all():
            return {**answer, "verdict": SYSTEMATIC}
        if errors.max(initial=0) <= rounding:
            return {**answer, "relative_bias": float(errors.mean()), "relative_std": 0.0, "verdict": EXACT}
        if n < MIN_SEEDS_FOR_BIAS:
            return {**answer, "verdict": TOO_FEW}
        centred = self.gram - self.gram.mean(axis=0) - self.gram.mean(axis=1)[:, None] + self.gram.mean()
        variance = float(np.trace(centred)) / (n - 1)
        answer["relative_bias"] = float(_ratio(math.sqrt(max(mean_sq - variance / n, 0)), norm))
        answer["relative_std"] = float(_ratio(math.sqrt(max(variance, 0)), norm))
        if answer["relative_std"] <= rounding:  # every seed deviates in the same way
            return {**answer, "p_value": 0.0, "verdict": SYSTEMATIC}
        p_value, freedom = bias_test(self.gram)
        systematic = p_value < level and answer["relative_bias"] > rounding
        answer |= {"p_value": p_value, "reference_freedom": freedom, "verdict": SYSTEMATIC if systematic else SAMPLING}
        return answer


def bias_test(gram: np.ndarray) -> tuple[float, float | None]:
    """p-value of "no bias" and the degrees of freedom d of its reference; see the page's head.

    Args:
        gram: products <d_i, d_j> of the deviations of N >= 4 runs.

    Returns:
        d is None where it is large enough for Student's t alone.
    """
    products = gram[np.triu_indices(len(gram), 1)]
    spread = products.std(ddof=1) / math.sqrt(len(products))
    if spread == 0:
        return float(products.mean() <= 0), None
    p_value = t_survival(float(products.mean() / spread), len(products) - 1)
    freedom = reference_freedom(gram)
    if freedom > MANY:
        return p_value, None
    z = -NormalDist().inv_cdf(min(max(p_value, 1e-300), 1 - 1e-16))
    return chi2_survival(freedom + math.sqrt(2 * freedom) * z, freedom), freedom


def reference_freedom(gram: np.ndarray) -> float:
    """d = (tr S^2)^3 / (tr S^3)^2 from N >= 4 runs, at least 1; 1, the most skewed case, where an estimate is not positive.

    With n = N - 1, s_k = tr W^k and W the Gram matrix of the centred runs divided by n, unbiased under normality:
    tr S^2 = n^2 / ((n - 1)(n + 2)) (s_2 - s_1^2 / n) and
    tr S^3 = n^4 / ((n - 1)(n - 2)(n + 2)(n + 4)) (s_3 - 3 s_1 s_2 / n + 2 s_1^3 / n^2).
    """
    n = len(gram) - 1
    w = (gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean()) / n
    s1, s2, s3 = float(np.trace(w)), float((w**2).sum()), float(np.trace(w @ w @ w))
    second = n**2 / ((n - 1) * (n + 2)) * (s2 - s1**2 / n)
    third = n**4 / ((n - 1) * (n - 2) * (n + 2) * (n + 4)) * (s3 - 3 * s1 * s2 / n + 2 * s1**3 / n**2)
    if second <= 0 or third <= 0:
        return 1.0
    return max(1.0, second**3 / third**2)


def _ratio(numerator, denominator):
    """numerator / denominator, with 0 / 0 = 0 and x / 0 = inf."""
    numerator, denominator = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = numerator / denominator
    return np.where((numerator == 0) & (denominator == 0), 0.0, quotient)
