"""The statistics of the memory profiler, on series whose truth is known: levels, coverage, and what is no leak."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from qexport.memory.trend import (
    LEAK,
    LEVEL,
    NONE,
    SLOWING_DOWN,
    TOO_FEW,
    autocorrelation_time,
    kendall_quantile,
    leak_test,
    slope_test,
    theil_sen,
)

CALLS = 1000
X = np.arange(1, CALLS + 1)
KB = 1024


def most(trials: int, probability: float) -> int:
    """More successes than this have a probability below 1e-4 when each has the given one at most."""
    return int(stats.binom.ppf(1 - 1e-4, trials, probability))


def ar1(rng, phi: float, n: int) -> np.ndarray:
    """An autoregressive series of unit variance; a random walk for phi = 1."""
    steps = rng.standard_normal(n)
    if phi == 1:
        return np.cumsum(steps)
    y = np.empty(n)
    y[0] = steps[0]
    for i in range(1, n):
        y[i] = phi * y[i - 1] + np.sqrt(1 - phi**2) * steps[i]
    return y


@pytest.mark.parametrize("phi", [0.0, 0.6, 0.9])
def test_autocorrelation_time_of_a_known_process(phi):
    """tau = (1 + phi) / (1 - phi); Sokal's error is tau sqrt(2 (2 M + 1) / n) with the window M = 5 tau."""
    n, tau = 20_000, (1 + phi) / (1 - phi)
    found = autocorrelation_time(ar1(np.random.default_rng(1), phi, n))
    # M = 5 tau cuts exp(-5 * ...) off; the bound is five standard deviations
    assert abs(found - tau) < 5 * tau * np.sqrt(2 * (10 * tau + 1) / n)


@pytest.mark.parametrize("phi", [0.0, 0.8])
def test_the_level_of_the_slope_test(phi):
    """Trend-free series are called growing in the stated share of cases, with correlation as without."""
    rng, trials = np.random.default_rng(2), 400
    x = np.arange(500)
    below = sum(slope_test(x, ar1(rng, phi, 500))[1] < 0.05 for _ in range(trials))
    # tau is estimated from few effective readings where they are correlated, which makes the test somewhat too keen
    assert below <= most(trials, 0.05 if phi == 0 else 0.075)


def test_the_slope_test_against_least_squares():
    rng = np.random.default_rng(3)
    for _ in range(20):
        x, y = np.arange(60.0), rng.standard_normal(60)
        slope, p = slope_test(x, y)
        expected = stats.linregress(x, y, alternative="greater")
        assert slope == pytest.approx(expected.slope)
        tau = autocorrelation_time(y - expected.intercept - expected.slope * x)
        if tau == 1 and slope > 0:
            assert p == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_false_alarms_on_series_that_do_not_grow(phi):
    """Stationary noise of any correlation, and a random walk, which no test of a slope expects: at most the level."""
    rng, trials = np.random.default_rng(4), 300
    verdicts = [leak_test(X, 64 * KB * ar1(rng, phi, CALLS), CALLS).verdict for _ in range(trials)]
    assert verdicts.count(LEAK) <= most(trials, LEVEL)


@pytest.mark.parametrize(
    ("calls", "noise", "phi"), [(CALLS, 0, 0.0), (CALLS, 8 * KB, 0.0), (2 * CALLS, 16 * KB, 0.8), (2 * CALLS, 64 * KB, 0.0)]
)
def test_one_kibibyte_a_call_is_found(calls, noise, phi):
    """In 2000 calls in noise as large as 64 calls' leak."""
    rng, x = np.random.default_rng(5), np.arange(1, calls + 1)
    found = [leak_test(x, KB * x + noise * ar1(rng, phi, calls), calls) for _ in range(40)]
    assert all(test.verdict == LEAK for test in found)
    for test in found:
        assert np.mean(test.bytes_per_call) == pytest.approx(KB, rel=0.5)


def test_a_leak_in_every_tenth_call_is_found():
    rng, calls = np.random.default_rng(6), 2 * CALLS
    x = np.arange(1, calls + 1)
    found = [leak_test(x, np.cumsum(10 * KB * (rng.random(calls) < 0.1)), calls).verdict for _ in range(40)]
    assert found.count(LEAK) >= 38


def test_spikes_do_not_hide_a_leak():
    rng = np.random.default_rng(7)
    spikes = 50_000 * KB * (rng.random(CALLS) < 0.2)
    assert leak_test(X, KB * X + spikes, CALLS).verdict == LEAK


def _fill(x, size):
    return KB * np.minimum(x, size)


@pytest.mark.parametrize(
    ("name", "y"),
    [
        ("constant", np.full(CALLS, 5 * KB)),
        ("one step late", KB * (X > 900)),
        ("steps of a growing table", 64 * KB * np.floor(np.log2(X))),
        ("warm-up of a third", _fill(X, CALLS / 3)),
        ("a cache that is full at half", _fill(X, CALLS / 2)),
        ("a sawtooth of garbage", 10 * KB * (X % 170)),
        ("a slow sawtooth", KB * (X % 400)),
        ("less than an object a call", 8.0 * X),
        ("memory that is given back", -KB * X),
    ],
)
def test_what_is_no_leak(name, y):
    assert leak_test(X, y, CALLS).verdict == NONE, name


def test_growth_that_pages_alone_would_show():
    """1 KiB a call behind the first quarter of 1000 calls is 750 KiB."""
    y = KB * X
    assert [leak_test(X, y, CALLS, least * KB).verdict for least in (740, 760)] == [LEAK, NONE]


def test_a_cache_that_fills_ever_more_slowly():
    """300 keys drawn at random: the rate falls as exp(-x / 300), but the cache grows in every part."""
    rng = np.random.default_rng(8)
    for _ in range(20):
        keys = rng.integers(0, 300, CALLS)
        held = KB * np.array([len(set(keys[:i])) for i in X])
        assert leak_test(X, held, CALLS).verdict in (SLOWING_DOWN, NONE)
    assert leak_test(X, _fill(X, 0.9 * CALLS), CALLS).verdict == SLOWING_DOWN
    held = KB * 300 * (1 - np.exp(-X / 300))
    assert leak_test(X, held, CALLS).verdict == SLOWING_DOWN


def test_too_few_readings():
    assert leak_test([], [], 0).verdict == TOO_FEW
    assert leak_test(X[:28], KB * X[:28], 28).verdict == TOO_FEW
    assert leak_test(X[:32], KB * X[:32], 32).verdict == LEAK
    # readings of the first calls say nothing about the others
    assert leak_test(X[:500], KB * X[:500], CALLS).verdict == TOO_FEW


def test_the_slope_of_theil_and_sen_against_scipy():
    rng = np.random.default_rng(9)
    y = rng.standard_normal(60) + 0.3 * np.arange(60)
    found = theil_sen(np.arange(60), y)
    tail = slice(15, 60)  # 45 readings behind the warm-up; uncorrelated ones are not put together beyond pairs
    expected = stats.theilslopes(y[tail], np.arange(60)[tail])
    assert found["slope"] == pytest.approx(expected.slope, rel=0.05)
    assert found["readings"] == 60
    low, high = found["ci95"]
    assert low < found["slope"] < high


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_the_interval_of_the_slope_covers_it(phi):
    rng, trials = np.random.default_rng(10), 200
    x = np.arange(400)
    missed = 0
    for _ in range(trials):
        interval = theil_sen(x, 2.0 * x + 100 * ar1(rng, phi, 400))["ci95"]
        missed += interval is not None and not interval[0] <= 2 <= interval[1]
    assert missed <= most(trials, 0.05 if phi == 0 else 0.075)


@pytest.mark.parametrize("n", [4, 5, 6, 7])
def test_the_quantile_of_kendalls_s_by_counting(n):
    def s(order):
        return sum(1 if order[j] > order[i] else -1 for i in range(n) for j in range(i + 1, n))

    values = np.sort([s(order) for order in permutations(range(n))])
    found = kendall_quantile(n, 0.975)
    pairs = n * (n - 1) // 2
    reach = [v for v in np.unique(values) if v < pairs and np.mean(values <= v) >= 0.975 - 1e-12]
    assert found == (min(reach) if reach else None)


def test_the_quantile_of_many_values_is_normal():
    assert abs(kendall_quantile(30, 0.975) - kendall_quantile(31, 0.975)) < 20


def test_constant_memory_has_a_slope_of_zero():
    assert theil_sen(np.arange(100), np.full(100, 7.0)) == {"slope": 0.0, "ci95": [0.0, 0.0], "readings": 100}
    assert theil_sen(np.arange(7), np.arange(7))["slope"] is None
