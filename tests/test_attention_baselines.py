"""The attentions that ours are compared with, and the reference in float64: each is what its name says."""

import numpy as np
import pytest
import torch

from qexport.scaling import baselines, reference
from qexport.scaling.reference import gaussian_bound

GAUSSIAN = np.random.default_rng(0).standard_normal((3, 2, 3, 40, 8))


def exact(causal: bool) -> np.ndarray:
    return reference.attention(*GAUSSIAN, np.arange(40), causal)


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_softmax_attention_of_some_rows(causal):
    q, k, v = map(torch.from_numpy, GAUSSIAN)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    rows = reference.rows_of(40, 7)
    assert len(rows) == 7
    assert rows[-1] == 39
    np.testing.assert_allclose(reference.attention(*GAUSSIAN, rows, causal), expected[:, :, rows], rtol=1e-10)


def test_head_errors_is_one_number_per_head():
    expected = np.stack([np.ones((5, 4)), np.full((5, 4), 2.0)])
    assert reference.head_errors(expected + 0.1, expected) == pytest.approx([0.1, 0.05])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_all_keys_on_top_are_exact_attention(causal, tail, monkeypatch):
    monkeypatch.setattr(baselines, "BLOCK", 16)
    found = baselines.top_k(40, tail, causal)(*map(torch.from_numpy, GAUSSIAN))
    np.testing.assert_allclose(found, exact(causal), rtol=1e-9, atol=1e-12)


def test_top_k_by_its_definition(monkeypatch):
    """Row 9 of a causal head, with 4 of its 10 keys: renormalised, and with the mean of the 10 values for the rest."""
    monkeypatch.setattr(baselines, "BLOCK", 16)
    q, k, v = (x[1, 2] for x in GAUSSIAN)
    p = np.exp(k[:10] @ q[9] / 8**0.5)
    p /= p.sum()
    top = np.argsort(p)[-4:]
    renormalised = p[top] @ v[top] / p[top].sum()
    with_mean = p[top] @ v[top] + (1 - p[top].sum()) * v[:10].mean(0)
    for tail, expected in ((False, renormalised), (True, with_mean)):
        found = baselines.top_k(4, tail, causal=True)(*map(torch.from_numpy, GAUSSIAN))
        np.testing.assert_allclose(found[1, 2, 9], expected, rtol=1e-9)


def test_all_keys_drawn_are_exact_attention():
    np.testing.assert_allclose(baselines.uniform(40)(*map(torch.from_numpy, GAUSSIAN)), exact(False), rtol=1e-9)


@pytest.mark.parametrize("keys", [40, 23])
def test_linformer_of_fewer_keys_is_linformer_of_keys_and_zeros(keys):
    """The module is made for 40 keys; a shorter input is mixed as if it were filled up with zeros."""
    q, k, v = (torch.from_numpy(x).float()[:, :, :keys] for x in GAUSSIAN)
    filled = [torch.nn.functional.pad(x, (0, 0, 0, 40 - keys)) for x in (k, v)]
    pytest.importorskip("linformer")
    attend = baselines.linformer(12, 40, 3, 8)
    np.testing.assert_allclose(attend(q, k, v).detach(), attend(q, *filled).detach(), rtol=1e-4, atol=1e-5)


def test_performer_converges_to_softmax_attention():
    """More features, less error, mean of 8 draws on scores of variance 1/16: noise falls to an eighth with 64 times as many,
    to which the package adds a bias, since it keeps its features from 0."""
    pytest.importorskip("performer_pytorch")
    q, k, v = (torch.from_numpy(x).float() for x in GAUSSIAN)
    q, k = q / 2, k / 2
    expected = reference.attention(*(x.numpy() for x in (q, k, v)), np.arange(40), False)
    few, many = (
        np.mean(
            [reference.head_errors(baselines.performer(count, 8, False, s)(q, k, v).numpy(), expected) for s in range(8)]
        )
        for count in (16, 1024)
    )
    assert many < few / 2


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("performer_pytorch", lambda seed: baselines.performer(None, 8, False, seed)),
        ("linformer", lambda seed: baselines.linformer(12, 40, 3, 8, seed)),
        ("torch", lambda seed: baselines.uniform(10, seed)),
    ],
)
def test_a_seed_repeats_and_leaves_the_callers_generator_alone(package, make):
    pytest.importorskip(package)
    inputs = [torch.from_numpy(x).float() for x in GAUSSIAN]
    before = torch.random.get_rng_state()
    first, again, other = (make(seed)(*inputs) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("n", "bound"), [(128, 0.30), (512, 0.57), (1024, 0.67), (32, 0.0)])
def test_gaussian_bound(n, bound):
    assert gaussian_bound(32, n) == pytest.approx(bound, abs=0.006)


def test_gaussian_bound_is_what_the_best_keys_leave():
    """The error of reading the 32 most probable of 512 values, with independent values: the bound as n grows."""
    rng = np.random.default_rng(0)
    p = np.exp(rng.standard_normal((2000, 512)))
    left = np.sort(p, -1)[:, :-32]
    error = ((left**2).sum() / (p**2).sum()) ** 0.5
    assert error == pytest.approx(gaussian_bound(32, 512), rel=0.05)


@pytest.mark.parametrize("package", ["performer_pytorch", "linformer"])
def test_modules_go_to_another_device_as_a_whole(package):
    pytest.importorskip(package)
    made = baselines.performer(8, 4, False) if package == "performer_pytorch" else baselines.linformer(4, 16, 2, 4)
    moved = made.to("meta").state_dict()
    assert moved
    assert {tensor.device.type for tensor in moved.values()} == {"meta"}
