"""Each estimator against its theory. Every test states its hypothesis and computes its bound.

With V the identity the output row is the row of weights that the estimator gives to the keys, so that selections and
weights can be read off the kernel itself.
"""

import numpy as np
import pytest
from attention_backends import run_binding
from scipy import stats

LEVEL = 1e-6  # of each test, two-sided and after Bonferroni: one false alarm in a million runs
N, SEEDS = 48, 1500


def problem(n=N, rows=3, spread=1.5):
    """One head, `rows` queries, n keys, V the identity; returns the feeds and p (rows, n)."""
    rng = np.random.default_rng(11)
    q = rng.standard_normal((1, 1, rows, 8)).astype(np.float32)
    k = (spread * rng.standard_normal((1, 1, n, 8))).astype(np.float32)
    v = np.eye(n, dtype=np.float32)[None, None]
    scores = (q[0, 0].astype(np.float64) @ k[0, 0].T.astype(np.float64)) / np.sqrt(8)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return {"Q": q, "K": k, "V": v}, p / p.sum(-1, keepdims=True)


def draws(feeds, seeds=SEEDS, **attributes):
    """Weights (seeds, rows, n) of independent seeds."""
    return np.stack([run_binding(feeds, "float32", seed, attributes)["Y"][0, 0] for seed in range(seeds)])


def assert_mean(samples, want):
    """Hypothesis: the mean of `samples` over axis 0 is `want`. Bound: normal quantile at LEVEL over all elements."""
    bound = stats.norm.isf(LEVEL / (2 * want.size)) * samples.std(0, ddof=1) / np.sqrt(len(samples))
    off = np.abs(samples.mean(0) - want) - bound
    assert off.max() <= 1e-5, f"biased: mean is {off.max():.3g} beyond its bound"


@pytest.mark.parametrize(
    ("strategy", "control_variate"),
    [*((s, c) for s in ("naive", "stratified", "adaptive") for c in (0, 1)), ("hybrid", 0)],
)
def test_unbiased(strategy, control_variate):
    feeds, p = problem()
    assert_mean(draws(feeds, strategy=strategy, num_samples=8, control_variate=control_variate), p)


def test_naive_is_multinomial():
    """Hypothesis: S times the weights are multinomial counts with probabilities p (variance p (1 - p) / S)."""
    feeds, p = problem()
    S = 8
    counts = S * draws(feeds, strategy="naive", num_samples=S, control_variate=0)
    assert np.abs(counts - counts.round()).max() < 1e-5
    assert np.abs(counts.sum(-1) - S).max() < 1e-4
    for row, probabilities in zip(counts.round().sum(0), p, strict=True):
        expected = probabilities * S * SEEDS
        assert expected.min() > 5  # what the chi-square approximation needs
        observed, wanted = row, expected
        assert stats.chisquare(observed, wanted * sum(observed) / wanted.sum()).pvalue > LEVEL
    got = (counts / S).var(0, ddof=1)
    # variance of a sample variance, from the fourth moment of the data itself
    centred = counts / S - p
    spread = np.sqrt(np.maximum((centred**4).mean(0) - got**2, 1e-20) / SEEDS)
    assert (np.abs(got - p * (1 - p) / S) <= stats.norm.isf(LEVEL / p.size) * spread + 1e-4).all()


def inclusion(size, budget):
    """pi_j = min(1, c size_j) with sum pi = budget, by sorting: another way to it than the kernel's iteration."""
    order = np.sort(size)[::-1]
    for certain in range(len(size)):
        c = (budget - certain) / order[certain:].sum()
        if c * order[certain] <= 1:
            return np.minimum(1, c * size)
    return np.ones_like(size)


def test_stratified_takes_keys_with_their_inclusion_probabilities():
    """Hypothesis: key j is chosen with probability pi_j (binomial), S keys in every draw, weight p_j / pi_j."""
    feeds, p = problem(spread=3)
    S = 8
    weights = draws(feeds, strategy="stratified", num_samples=S, control_variate=0)
    chosen = weights > 0
    assert np.abs(chosen.sum(-1) - S).max() <= 1  # fixed point may round the last stratum in or out
    assert (chosen.sum(-1) == S).mean() > 0.999
    for row in range(len(p)):
        pi = inclusion(p[row], S)
        assert (pi == 1).any()
        assert (pi < 0.5).any()
        hits = chosen[:, row].sum(0)
        for j in range(N):
            assert stats.binomtest(int(hits[j]), SEEDS, min(pi[j], 1.0)).pvalue > LEVEL / N or pi[j] > 1 - 1e-6
            if pi[j] > 1 - 1e-9:
                assert hits[j] == SEEDS
            if hits[j]:
                np.testing.assert_allclose(weights[chosen[:, row, j], row, j], p[row, j] / pi[j], rtol=1e-3)


def test_stratified_draws_one_key_per_stratum():
    """Systematic sampling: between two chosen keys the cumulative inclusion probability grows by one."""
    feeds, p = problem()
    weights = draws(feeds, seeds=100, strategy="stratified", num_samples=8, control_variate=0)
    for row in range(len(p)):
        after = np.cumsum(inclusion(p[row], 8))
        before = after - inclusion(p[row], 8)
        for draw in weights[:, row]:
            picked = np.flatnonzero(draw)
            # the point of stratum k lies in key picked[k]; offsets u in [0, 1) that all of them admit must exist
            low = (before[picked] - np.arange(len(picked))).max()
            high = (after[picked] - np.arange(len(picked))).min()
            assert low <= high + 1e-5


def test_hybrid_always_takes_the_largest():
    feeds, p = problem()
    weights = draws(feeds, seeds=300, strategy="hybrid", num_samples=8, control_variate=0)
    for row in range(len(p)):
        top = np.argsort(-p[row])[:4]
        assert (weights[:, row, top] > 0).all()
        assert np.abs((weights[:, row] > 0).sum(-1) - 8).max() <= 1


def test_adaptive_gives_flat_rows_more_than_peaked_ones():
    """Hypothesis: expected keys per row are proportional to sqrt(exp(entropy)) and add up to the budget."""
    n, S = 64, 8
    rng = np.random.default_rng(3)
    direction = rng.standard_normal((n, 8)).astype(np.float32)
    q = np.stack([f * np.ones(8, np.float32) for f in (0.2, 0.6, 1.2, 2.5)])[None, None]
    feeds = {"Q": q, "K": direction[None, None], "V": np.eye(n, dtype=np.float32)[None, None]}
    scores = q[0, 0].astype(np.float64) @ direction.T / np.sqrt(8)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    support = np.exp(-(p * np.log(p)).sum(-1))
    want = S * 4 * np.sqrt(support) / np.sqrt(support).sum()
    taken = (draws(feeds, strategy="adaptive", num_samples=S, control_variate=0) > 0).sum(-1)
    # systematic sampling takes floor or ceil of the real-valued budget, so the mean is within 1/sqrt(SEEDS) x 1/2 x quantile
    bound = stats.norm.isf(LEVEL / 8) * 0.5 / np.sqrt(SEEDS)
    assert np.abs(taken.mean(0) - want).max() <= bound + 1e-3
    assert np.abs(taken - want).max() < 1 + 1e-3


def test_control_variate_beats_plain_where_values_differ():
    """Hypothesis: sampling by p |v - mean v| has the smaller mean squared error where |v - mean v| varies.

    One-sided paired test over seeds at LEVEL, on values that are nearly equal except for a few outliers.
    """
    feeds, p = problem(n=96)
    rng = np.random.default_rng(2)
    v = 0.05 * rng.standard_normal((96, 12)) + 1.0
    v[::8] += 3 * rng.standard_normal((12, 12))
    feeds["V"] = v[None, None].astype(np.float32)
    exact = p @ v

    def squared_error(control_variate):
        y = draws(feeds, 400, strategy="stratified", num_samples=12, control_variate=control_variate)
        return ((y - exact) ** 2).sum((1, 2))

    assert stats.ttest_rel(squared_error(0), squared_error(1), alternative="greater").pvalue < LEVEL
