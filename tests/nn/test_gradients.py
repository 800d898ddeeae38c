"""Gradients of sampled attention: of the drawn estimate, and in the mean over draws of exact attention.

Statistical tests state their hypothesis and compute their bound, as in test_statistics.py.
"""

import pytest
import torch
from scipy import stats

from qexport.nn import QuantumMultiheadAttention, exact_attention, quantum_attention
from qexport.ops import QUANTUM_ATTENTION
from qexport.ops.draws_ref import combine, draw
from qexport.ops.quantum_attention_ref import quantum_attention_ref
from qexport.ops.strategies import read_by

LEVEL = 1e-6  # of each test, two-sided and after Bonferroni
BATCH, HEADS, QUERIES, KEYS, SIZE = 2, 2, 4, 24, 4


def tensors(*, keys=KEYS, kv_heads=HEADS, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (BATCH, HEADS, QUERIES, SIZE), (BATCH, kv_heads, keys, SIZE), (BATCH, kv_heads, keys, SIZE)
    return [torch.randn(shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


def direction(y):
    """A fixed cotangent: the loss is linear in the output, so that unbiased draws give unbiased gradients."""
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)


DRAWN = [(s, c) for s in ("naive", "stratified", "adaptive", "hybrid") for c in (0, 1)]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize(("strategy", "control_variate"), DRAWN)
def test_the_estimate_is_differentiated_as_it_is(strategy, control_variate, dropout):
    """Finite differences in float64, the draws held."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, 3, 40, generator=g, dtype=torch.float64, requires_grad=True)
    V = torch.randn(1, 2, 40, 3, generator=g, dtype=torch.float64, requires_grad=True)
    a = QUANTUM_ATTENTION.resolve({"strategy": strategy, "control_variate": control_variate, "num_samples": [6]})
    draws = draw(scores.softmax(-1), V, torch.ones(scores.shape, dtype=torch.bool), torch.tensor([40]), 5, a)
    assert not draws.importance.requires_grad
    assert ((draws.importance == 0).sum(-1) >= 20).all(), "most keys are not drawn"
    if strategy == "hybrid" and control_variate:
        assert len(draws.cluster.unique()) == 3, "40 keys in clusters of 16"
    kept = (torch.rand(scores.shape, generator=g) > 0.3).double() / 0.7 if dropout else None
    assert torch.autograd.gradcheck(lambda s, v: combine(s.softmax(-1), v, draws, kept), (scores, V))


CALLS = {
    "plain": {},
    "grouped": {"kv_heads": 1},
    "causal": {"is_causal": 1},
    "scaled_capped": {"scale": 0.9, "softcap": 2.0},
    "bool_mask": {"mask": "bool"},
    "float_mask": {"mask": "float"},
    "float_mask_of_keys": {"mask": "float", "mask_shape": (BATCH, 1, 1, KEYS)},
    "weights": {"need_weights": True},
    "dropout": {"dropout_p": 0.3},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("strategy", ["exact", "tree", "naive", "stratified", "adaptive", "hybrid"])
@pytest.mark.parametrize("name", CALLS)
def test_operator_has_the_gradient_of_the_reference_at_its_seed(name, strategy):
    call = dict(CALLS[name])
    dtype, kind = call.pop("dtype", torch.float32), call.pop("mask", None)
    shape = call.pop("mask_shape", (HEADS, QUERIES, KEYS))
    inputs = tensors(kv_heads=call.pop("kv_heads", HEADS), dtype=dtype)
    hidden = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.3
    if kind == "bool":
        inputs.append(~hidden)
    elif kind:
        inputs.append(torch.randn(shape).masked_fill(hidden, -torch.inf).requires_grad_())
    leaves = [x for x in inputs if x.requires_grad]
    need_weights, dropout_p = call.pop("need_weights", False), call.pop("dropout_p", 0.0)
    attributes = call | read_by(strategy, {"strategy": strategy, "num_samples": 5, "layer": 3})

    found = quantum_attention(*inputs, seed=9, need_weights=need_weights, dropout_p=dropout_p, **attributes)
    y, weights = found if need_weights else (found, None)
    outputs = quantum_attention_ref(*inputs, seed=9, dtype=dtype, dropout_p=dropout_p, qk_matmul_output_mode=3, **attributes)
    torch.testing.assert_close(y, outputs[0], rtol=0, atol=1e-5)
    loss, wanted = ((r[0] * direction(y)).sum() for r in ((y,), outputs))
    if need_weights:
        loss, wanted = loss + (weights**2).sum(), wanted + (outputs[3] ** 2).sum()
    got, want = (torch.autograd.grad(x, leaves) for x in (loss, wanted))
    for a, b in zip(got, want, strict=True):
        assert b.isfinite().all()
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def gradients(count, **attributes):
    """Outputs, and gradients of a linear loss by Q, K and V, of independent draws: (count, numbers) of float64.

    The items of a batch draw independently: here they are copies of one.
    """
    inputs = [x[:1].detach().repeat(count, 1, 1, 1).requires_grad_() for x in tensors()]
    y = quantum_attention(*inputs, seed=1, **attributes)  # the kernel where there is no dropout: float32 on the CPU
    grads = torch.autograd.grad((y * direction(y[0])).sum(), inputs)
    return torch.cat([x.flatten(1) for x in (y.detach(), *grads)], 1).double()


def off_bound(samples, want):
    """How far the mean of `samples` (seeds, numbers) is beyond the bound of the hypothesis that it is `want`, by number."""
    bound = stats.norm.isf(LEVEL / (2 * want.numel())) * samples.std(0) / len(samples) ** 0.5
    return (samples.mean(0) - want).abs() - bound


@pytest.mark.parametrize("strategy", ["naive", "stratified", "adaptive"])
def test_gradient_is_unbiased_with_control_variate(strategy):
    """Hypothesis: output and gradient are in the mean over draws the exact ones, number by number (normal quantile,
    Bonferroni)."""
    exact = gradients(1, strategy="exact")[0]
    samples = gradients(2000, strategy=strategy, num_samples=6)
    assert (samples.std(0) > 1e-3).double().mean() > 0.9, "it is drawn"
    assert off_bound(samples, exact).max() < 1e-5
    assert off_bound(samples, 1.5 * exact).max() > 0.01, "a gradient half as large again is found out"


def test_the_deterministic_tail_of_hybrid_is_a_bias():
    exact = gradients(1, strategy="exact")[0]
    samples = gradients(2, strategy="hybrid", num_samples=6)
    assert torch.equal(samples[0], samples[1])
    assert 0.01 < (samples[0] - exact).norm() / exact.norm() < 1


@pytest.mark.parametrize(
    ("strategy", "control_variate"), [("stratified", 1), ("stratified", 0), ("adaptive", 1), ("naive", 1)]
)
def test_more_samples_mean_less_noise(strategy, control_variate):
    """Hypothesis: the squared error of the gradient falls from 4 to 12 samples (one-sided Welch test at LEVEL).

    Without control variate the estimate is a ratio, which is consistent only: its error, bias included, falls to 0.
    """
    exact = gradients(1, strategy="exact")[0]
    settings = {"strategy": strategy, "control_variate": control_variate}

    def errors(samples):
        return ((gradients(400, num_samples=samples, **settings) - exact) ** 2).sum(-1).numpy()

    assert stats.ttest_ind(errors(4), errors(12), equal_var=False, alternative="greater").pvalue < LEVEL
    if strategy != "naive":
        assert (gradients(2, num_samples=KEYS, **settings) - exact).abs().max() < 1e-4


def test_dropout_has_the_classical_gradient_in_the_mean():
    """Hypothesis: output and gradient under dropout are in the mean those without, number by number."""
    calm = gradients(1, strategy="exact")[0]
    samples = gradients(2000, strategy="exact", dropout_p=0.4)
    assert off_bound(samples, calm).max() < 1e-5
    assert off_bound(samples, 0.6 * calm).max() > 0.01, "weights that are not scaled up again are found out"


def test_weights_that_are_not_asked_for_carry_no_gradient():
    module = QuantumMultiheadAttention(8, HEADS, num_samples=3, batch_first=True).eval()
    x = torch.randn(2, 12, 8)
    found = []
    for need_weights in (False, True):
        module.zero_grad()
        y, weights = module(x, x, x, need_weights=need_weights)
        y.square().sum().backward()
        found.append([p.grad.clone() for p in module.parameters()])
    assert weights.requires_grad
    assert module(x, x, x, need_weights=False)[1] is None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_gradient_by_the_weights_alone():
    """The probabilities are exact, and so is their gradient, however the output is sampled."""
    q, k, v = tensors()
    _, weights = quantum_attention(q, k, v, num_samples=2, need_weights=True)
    got = torch.autograd.grad((weights * direction(weights)).sum(), [q, k, v])
    p = (q @ k.transpose(-1, -2) / SIZE**0.5).softmax(-1)
    want = torch.autograd.grad((p * direction(p)).sum(), [q, k])
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)
    assert (got[2] == 0).all()


def test_gradient_of_a_float_mask():
    """Against torch's own attention, broadcast over batch and heads, -inf among its numbers and a row of nothing else."""
    q, k, v = tensors()
    bias = torch.randn(QUERIES, KEYS, generator=torch.Generator().manual_seed(2))
    bias[:, ::3] = -torch.inf
    bias.requires_grad_()
    y = quantum_attention(q, k, v, bias, strategy="exact")
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
    (a,), (b,) = (torch.autograd.grad((x * direction(x)).sum(), [bias]) for x in (y, want))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        bias[1] = -torch.inf
    for strategy in ("exact", "stratified", "hybrid", "naive", "adaptive"):
        y = quantum_attention(q, k, v, bias, strategy=strategy, **read_by(strategy, {"num_samples": 4}))
        assert (y[:, :, 1] == 0).all()
        for grad in torch.autograd.grad((y * direction(y)).sum(), [q, k, v, bias]):
            assert grad.isfinite().all()


def test_exact_attention_is_kept_for_the_backward():
    inputs = tensors()

    def grads(y):
        return torch.autograd.grad((y * direction(y)).sum(), inputs)

    with exact_attention():
        y = quantum_attention(*inputs, num_samples=3)
    found = [grads(y), grads(quantum_attention(*inputs, strategy="exact"))]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(grads(quantum_attention(*inputs, num_samples=3))[0], found[0][0])


def test_training_learns():
    """A few steps of Adam on a task that needs attention (copy the value of the marked key), 4 of 12 keys read per query."""
    torch.manual_seed(0)
    module = QuantumMultiheadAttention(8, 2, batch_first=True, num_samples=4)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)

    def loss():
        x = torch.randn(32, 12, 8)
        marked = torch.randint(12, (32,))
        x[..., 0] = 0.0
        x[torch.arange(32), marked, 0] = 4.0
        y = module(x[:, :1], x, x, need_weights=False)[0]
        return (y[:, 0, 1:] - x[torch.arange(32), marked, 1:]).square().mean()

    first = sum(loss().item() for _ in range(5)) / 5
    for _ in range(80):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    module.eval()
    assert sum(loss().item() for _ in range(5)) / 5 < 0.5 * first
