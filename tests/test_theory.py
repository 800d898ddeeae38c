"""docs/theory.md: a systematic draw has one random number u, so going through all intervals of u gives exact moments."""

import numpy as np
import pytest
import torch
from attention_backends import run_binding
from scipy import stats
from test_statistics import LEVEL, inclusion

from qexport.ops import draws_ref
from qexport.ops.draws_ref import T, combine
from qexport.ops.quantum_attention_ref import quantum_attention_ref

S = 16


def problem(seed, n=128, d=6):
    """Scores (n,) and values (n, d) of one row."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(1.5 * rng.standard_normal(n)), torch.from_numpy(rng.standard_normal((n, d)))


def sizes(p, V, centred):
    return p * torch.linalg.vector_norm(V - V.mean(0), dim=-1) if centred else p


def every_draw(size, budget, monkeypatch):
    """All outcomes of a systematic draw: their probabilities (outcomes,) and the importances (outcomes, keys)."""
    ends = np.cumsum(inclusion(size.numpy(), budget)) * T % T
    cuts = np.unique(np.concatenate([[0, T], ends]))
    wide = np.diff(cuts) > len(size)  # others are of the steps of the fixed point, which rounds every key up
    u = torch.from_numpy((cuts[:-1] + cuts[1:])[wide] / 2).long()
    rows = size.expand(1, 1, len(u), -1)
    monkeypatch.setattr(draws_ref, "philox4x32", lambda *counter: (u << 8)[None, None, :, None])
    budget = torch.full((1, 1, len(u), 1), float(budget), dtype=size.dtype)
    importance = draws_ref._systematic_importance(rows, budget, torch.zeros_like(rows, dtype=torch.bool), 0, 0)
    return torch.from_numpy(np.diff(cuts)[wide] / T), importance[0, 0]


def estimates(scores, V, importance, centred):
    """The estimate of every outcome, (outcomes, d), and the sum of its weights, as the reference combines them."""
    p = torch.softmax(scores, 0).expand(1, 1, len(importance), -1)
    cluster = torch.zeros(1, 1, len(V), dtype=torch.long) if centred else None
    found = combine(p, V[None, None], draws_ref.Draws(importance[None, None], cluster))
    return found[0, 0], (p * importance).sum(-1)[0, 0]


def close(found, wanted, rel):
    return torch.linalg.vector_norm(found - wanted) <= rel * torch.linalg.vector_norm(wanted)


# Intervals of u are off by the steps of the fixed point, n / T at most, of weights up to 1 / pi.
STEPS = 1e-4


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("budget", [S, S + 0.5])
def test_importances_have_mean_one(centred, budget, monkeypatch):
    scores, V = problem(0)
    chance, importance = every_draw(sizes(torch.softmax(scores, 0), V, centred), budget, monkeypatch)
    assert len(chance) > len(scores) / 2
    assert (chance @ importance - 1).abs().max() < STEPS
    counts = (importance > 0).sum(-1)
    assert set(counts.tolist()) == ({S} if budget == S else {S, S + 1})


def test_with_control_variate_value_and_gradient_are_unbiased(monkeypatch):
    scores, V = (x.requires_grad_() for x in problem(1))
    g = torch.from_numpy(np.random.default_rng(5).standard_normal(V.shape[1]))
    exact = torch.softmax(scores, 0) @ V
    chance, importance = every_draw(sizes(torch.softmax(scores, 0), V, True).detach(), S, monkeypatch)
    mean = chance @ estimates(scores, V, importance, True)[0]
    assert close(mean, exact, STEPS)
    wanted = torch.autograd.grad(exact @ g, (scores, V))
    for found, want in zip(torch.autograd.grad(mean @ g, (scores, V)), wanted, strict=True):
        assert close(found, want, STEPS)


def test_the_ratio_of_a_whole_budget_is_unbiased_but_for_its_gradient(monkeypatch):
    """The weights sum to one in every outcome; the gradient is off by -Cov(estimate, gradient of their sum)."""
    scores, V = (x.requires_grad_() for x in problem(2))
    g = torch.from_numpy(np.random.default_rng(6).standard_normal(V.shape[1]))
    exact = torch.softmax(scores, 0) @ V
    chance, importance = every_draw(torch.softmax(scores, 0).detach(), S, monkeypatch)
    every, total = estimates(scores, V, importance, False)
    assert (total - 1).abs().max() < STEPS
    mean = chance @ every
    assert close(mean, exact, STEPS)
    wanted = torch.autograd.grad(exact @ g, (scores, V), retain_graph=True)
    found = torch.autograd.grad(mean @ g, (scores, V), retain_graph=True)
    assert close(found[1], wanted[1], STEPS)
    off = found[0] - wanted[0]
    assert off.norm() > 100 * STEPS * wanted[0].norm()
    covariance = torch.autograd.grad((chance * (every @ g).detach()) @ total, scores)[0]
    assert close(off, -covariance, 0.01)


def test_the_bias_of_the_ratio_is_its_first_order(monkeypatch):
    """A budget of S + 1/2 keys takes S or S + 1: the sum of the weights varies by s (1 - s) / c^2."""
    scores, V = problem(3)
    p = torch.softmax(scores, 0)
    chance, importance = every_draw(p, S + 0.5, monkeypatch)
    every, total = estimates(scores, V, importance, False)
    weight = (p * importance)[:, inclusion(p.numpy(), S + 0.5) < 1].max()  # 1 / c: that of all keys that are not certain
    variance = chance @ (total - 1) ** 2
    assert variance == pytest.approx(0.25 * float(weight) ** 2, rel=1e-3)
    bias = chance @ every - p @ V
    first = -(chance * (total - 1)) @ (total[:, None] * (every - p @ V))
    assert bias.norm() > 1e-3 * (p @ V).norm()
    assert close(bias, first, 0.02)


def test_variance_is_hajeks_approximation(monkeypatch):
    """Hypothesis: so in the mean over orders of the keys that have nothing to do with their values, to 3 percent."""
    ratios = []
    for seed in range(60):
        scores, V = problem(100 + seed)
        p = torch.softmax(scores, 0)
        x = sizes(p, V, True)
        chance, importance = every_draw(x, S, monkeypatch)
        every, _ = estimates(scores, V, importance, True)
        pi = torch.from_numpy(inclusion(x.numpy(), S))
        b = pi * (1 - pi)
        unit = torch.nn.functional.normalize(V - V.mean(0), dim=-1)
        mean_unit = b @ unit / b.sum()
        c = (pi / x)[pi < 1].mean()
        ratios.append(float(chance @ ((every - p @ V) ** 2).sum(-1) / ((1 - mean_unit @ mean_unit) * b.sum() / c**2)))
    error = stats.norm.isf(LEVEL / 2) * np.std(ratios, ddof=1) / np.sqrt(len(ratios))
    assert abs(np.mean(ratios) - 1) <= error + 0.03
    assert error < 0.15


def test_pairs_that_are_never_drawn_together(monkeypatch):
    """They are why no function of one draw is an unbiased estimate of its variance."""
    scores, V = problem(4)
    chance, importance = every_draw(sizes(torch.softmax(scores, 0), V, True), S, monkeypatch)
    chosen = (importance > 0).double()
    joint = chosen.T @ (chance[:, None] * chosen)
    assert (joint == 0).double().mean() > 0.5


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("strategy", ["naive", "stratified"])
def test_squared_error_of_the_kernel(strategy, centred, monkeypatch):
    """Hypothesis: its mean over seeds is the variance of docs/theory.md. Bound: normal quantile at LEVEL."""
    scores, V = problem(7, n=48)
    p = torch.softmax(scores, 0)
    y, a = p @ V, torch.linalg.vector_norm(V - V.mean(0), dim=-1)
    if strategy == "stratified":
        chance, importance = every_draw(sizes(p, V, centred), S, monkeypatch)
        wanted = chance @ ((estimates(scores, V, importance, centred)[0] - y) ** 2).sum(-1)
    elif centred:
        wanted = ((p @ a) ** 2 - ((y - V.mean(0)) ** 2).sum()) / S
    else:
        wanted = p @ ((V - y) ** 2).sum(-1) / S
    rows = 4000
    feeds = {"Q": np.tile(scores.numpy(), (1, 1, rows, 1)), "K": np.eye(48)[None, None], "V": V.numpy()[None, None]}
    feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
    attributes = {"strategy": strategy, "num_samples": S, "control_variate": int(centred), "scale": 1.0}
    squared = ((run_binding(feeds, "float32", 3, attributes)["Y"][0, 0] - y.numpy()) ** 2).sum(-1)
    assert abs(squared.mean() - float(wanted)) <= stats.norm.isf(LEVEL / 2) * squared.std(ddof=1) / np.sqrt(rows)


def test_the_gradient_of_naive_is_short_by_one_over_s():
    """Hypothesis: without control variate its mean is (1 - 1 / S) times the exact one. Bound: normal quantile at LEVEL."""
    scores, V = problem(8, n=12, d=2)
    rows, S = 4000, 4
    every = scores.expand(rows, -1).clone().requires_grad_()
    Y = quantum_attention_ref(
        *(every[None, None], torch.eye(12, dtype=torch.float64)[None, None], V[None, None]),
        strategy="naive",
        num_samples=S,
        control_variate=0,
        scale=1.0,
    )[0]
    found = torch.autograd.grad(Y[..., 0].sum(), every)[0]
    leaf = scores.clone().requires_grad_()
    wanted = (1 - 1 / S) * torch.autograd.grad(torch.softmax(leaf, 0) @ V[:, 0], leaf)[0]
    bound = stats.norm.isf(LEVEL / (2 * 12)) * found.std(0) / rows**0.5
    assert ((found.mean(0) - wanted).abs() <= bound).all()
    assert (wanted.abs() > S * bound).any()  # the factor would be seen if it were missing


def test_hybrid_keeps_its_bound():
    """|error| <= the sum of p |v - mean of its cluster| over the keys that are not taken, row by row."""
    rng = np.random.default_rng(9)
    Q, K, V = (torch.from_numpy(rng.standard_normal((1, 2, n, 8))) for n in (20, 200, 200))
    p = torch.softmax(Q @ K.mT, -1)
    Y = quantum_attention_ref(Q, K, V, strategy="hybrid", num_samples=S, control_variate=1, scale=1.0)[0]
    cluster = draws_ref._value_clusters(V, torch.tensor([200]))
    x = p * torch.linalg.vector_norm(V - draws_ref._centres(V, cluster), dim=-1)[:, :, None]
    bound = x.sort(-1, descending=True).values[..., S:].sum(-1)
    error = torch.linalg.vector_norm(Y - p @ V, dim=-1)
    assert (error <= bound).all()
    assert error.max() > 0.1 * bound.min()
