"""Gradients of QuantumAttentionSimulator: exact without shot noise, unbiased with it."""

import pytest
import torch
from noise_cases import NAMES
from scipy.stats import norm

from qexport.nn import QuantumAttentionSimulator
from qexport.noise.comparison import METHODS


def leaves(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def number(value):
    return torch.tensor(value, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(
    ("channel", "basis"),
    [(name, basis) for name in NAMES for basis in ("z", "x", "overlap") if (name, basis) != ("readout", "overlap")],
)
def test_closed_form(channel, basis):
    """In Q, K, V and the level, one per qubit, with five keys of three qubits: what leaks is divided by."""
    Q, K, V = leaves((2, 3, 4), (2, 5, 4), (2, 5, 2))
    level = number([0.1, 0.3] if basis == "overlap" else [0.1, 0.3, 0.2])
    sim = QuantumAttentionSimulator(channel, basis=basis)
    assert torch.autograd.gradcheck(lambda *x: sim.simulate_attention(*x[:3], None, x[3]), (Q, K, V, level))


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("convention", ["replace", "error"])
def test_depolarizing_in_every_form(scope, convention):
    Q, K, V, level = *leaves((3, 4), (4, 4), (4, 2)), number(0.2)
    for basis in ("z", "x", "overlap"):
        sim = QuantumAttentionSimulator(scope=scope, convention=convention, basis=basis)
        assert torch.autograd.gradcheck(lambda *x, sim=sim: sim.simulate_attention(*x[:3], None, x[3]), (Q, K, V, level))


@pytest.mark.parametrize("basis", ["z", "x", "overlap"])
def test_times_of_thermal_relaxation(basis):
    Q, K, V = leaves((3, 4), (4, 4), (4, 2))

    def attend(T1, T2, excited, t):
        sim = QuantumAttentionSimulator("thermal_relaxation", basis=basis, T1=T1, T2=T2, excited_population=excited)
        return sim.simulate_attention(Q.detach(), K.detach(), V.detach(), None, t)

    assert torch.autograd.gradcheck(attend, tuple(map(number, (1.0, 0.8, 0.2, 0.3))))


@pytest.mark.parametrize("basis", ["z", "x"])
def test_masks(basis):
    """A probability of exactly 0 has an infinite derivative of its root, which no mask must let through."""
    Q, K, V, level, bias = *leaves((3, 4), (4, 4), (4, 2)), number(0.2), leaves((3, 4), seed=1)[0]
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    sim = QuantumAttentionSimulator(basis=basis)
    call = sim.simulate_attention
    assert torch.autograd.gradcheck(lambda *x: call(*x[:3], None, x[3], attn_mask=mask), (Q, K, V, level))
    assert torch.autograd.gradcheck(lambda b: call(Q.detach(), K.detach(), V.detach(), None, 0.2, attn_mask=b), bias)
    for shots in (None, 50):
        for leaf in (Q, K, V, level):
            output, _ = call(Q, K, V, shots, level, attn_mask=mask, is_causal=True)
            assert torch.autograd.grad(output.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("mitigation", ["readout_inversion", "zne", "zne:1-1.5-2", "pec", "repetition:3"])
def test_mitigated(mitigation):
    Q, K, V, level = *leaves((3, 4), (4, 4), (4, 2)), number(0.2)
    sim = QuantumAttentionSimulator(mitigation=mitigation)
    assert torch.autograd.gradcheck(lambda *x: sim.simulate_attention(*x[:3], None, x[3]), (Q, K, V, level))


def within_its_interval(samples: torch.Tensor, exact: torch.Tensor) -> None:
    """The mean of `samples` (N, ...) lies in its confidence interval around `exact`: 99.9 % for all coordinates together."""
    error = samples.std(0) / len(samples) ** 0.5
    z = norm.isf(1e-3 / 2 / exact.numel())
    assert (error > 0).any(), "there is something to average"
    off = (samples.mean(0) - exact).abs()
    assert (off <= z * error + 1e-12).all(), (off / error).max()
    wrong = (samples.mean(0) - 0.8 * exact).abs() <= z * error + 1e-12
    assert not wrong.all(), "sharp enough to see a fifth missing"


@pytest.mark.parametrize(
    ("mitigation", "basis"),
    [
        (m, basis)
        for m in METHODS
        for basis in ("z", "x")
        if not m.endswith("project") and (m, basis) != ("repetition:3", "x")
    ],
)
@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_unbiased_with_shots(mitigation, basis, backend):
    """Of a linear loss, over independent draws: four keys fill two qubits, so nothing is divided by."""
    copies = 20000
    one = leaves((2, 4), (4, 4), (4, 3))
    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    settings = {"basis": basis, "mitigation": mitigation, "backend": backend}
    sim = QuantumAttentionSimulator("depolarizing", **settings)

    exact_level = number(0.3)
    output, _ = sim.simulate_attention(*one, None, exact_level)
    exact = torch.autograd.grad((output * weight).sum(), [*one, exact_level])

    many = [x.detach().expand(copies, *x.shape).clone().requires_grad_() for x in one]
    output, _ = sim.simulate_attention(*many, 8, 0.3)
    for samples, want in zip(torch.autograd.grad((output * weight).sum(), many), exact, strict=False):
        within_its_interval(samples, want)


def test_unbiased_in_the_level():
    """One seed after the other: a level is shared by all rows of a call."""
    Q, K, V = (x.detach() for x in leaves((2, 4), (4, 4), (4, 3)))
    level, sim = number(0.3), QuantumAttentionSimulator("amplitude_damping")
    output, _ = sim.simulate_attention(Q, K, V, None, level)
    (exact,) = torch.autograd.grad(output.sum(), level)
    samples = []
    for seed in range(2000):
        output, _ = sim.simulate_attention(Q, K, V, 16, level, seed=seed)
        samples += torch.autograd.grad(output.sum(), level)
    within_its_interval(torch.stack(samples), exact)


def test_overlaps_without_renormalisation_are_unbiased_too():
    one, copies = leaves((2, 4), (3, 4), (3, 2)), 20000
    sim = QuantumAttentionSimulator("phase_damping", basis="overlap", renormalize=False)
    output, _ = sim.simulate_attention(*one, None, 0.3)
    exact = torch.autograd.grad(output.sum(), one)
    many = [x.detach().expand(copies, *x.shape).clone().requires_grad_() for x in one]
    output, _ = sim.simulate_attention(*many, 8, 0.3)
    for samples, want in zip(torch.autograd.grad(output.sum(), many), exact, strict=True):
        within_its_interval(samples, want)


def test_the_value_is_that_without_gradient():
    Q, K, V = leaves((2, 3, 10, 8), (2, 3, 21, 8), (2, 3, 21, 4))
    for mitigation in METHODS:
        sim = QuantumAttentionSimulator(mitigation=mitigation)
        with torch.no_grad():
            want, _ = sim.simulate_attention(Q, K, V, 40, 0.1)
        found, weights = sim.simulate_attention(Q, K, V, 40, 0.1)
        assert weights.requires_grad
        assert (found - want).abs().max() < 1e-6
