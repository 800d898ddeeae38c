"""Heads with settings of their own, grouped heads, and masks per head.

Draws are a function of (seed, layer, batch * heads + head, query), where `heads` counts those of one call. Heads that differ
in num_samples alone are one call, others are groups in the order of their first head; group g counts as layer + 65536 g.
"""

import pytest
import torch

from qexport.nn import QuantumMultiheadAttention, quantum_attention
from qexport.ops.strategies import read_by

WIDTH, HEADS, QUERIES, KEYS, LAYER, SEED = 32, 4, 6, 40, 3, 11
SIZE = WIDTH // HEADS
GROUP = 65536
EVEN = {"quantum_backend": "stratified", "adaptive_samples": False}


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module(order=range(HEADS), layer=LAYER, **settings):
    """In evaluation, its heads in another order than they are drawn in, its output that of the heads side by side."""
    torch.manual_seed(1)
    made = QuantumMultiheadAttention(WIDTH, HEADS, batch_first=True, seed=SEED, layer=layer, **settings).eval()
    with torch.no_grad():
        weight = made.in_proj_weight.unflatten(0, (3, HEADS, SIZE))
        made.in_proj_weight.copy_(weight[:, list(order)].flatten(0, 2).clone() * 2)
        made.out_proj.weight.copy_(torch.eye(WIDTH))
    return made


def attend(made, mask=None, order=range(HEADS), batch=1):
    """(batch, queries, heads, size)"""
    inputs = rows(batch, QUERIES, WIDTH), rows(batch, KEYS, WIDTH, seed=1), rows(batch, KEYS, WIDTH, seed=2)
    mask = None if mask is None else mask.unflatten(0, (batch, HEADS))[:, list(order)].flatten(0, 1)
    with torch.no_grad():
        return made(*inputs, attn_mask=mask, need_weights=False)[0].unflatten(-1, (HEADS, SIZE))


MASKS = {
    "no_mask": None,
    "bool": rows(HEADS, QUERIES, KEYS, seed=3) > 0.5,
    "float": rows(HEADS, QUERIES, KEYS, seed=4).masked_fill(rows(HEADS, QUERIES, KEYS, seed=3) > 0.5, -torch.inf),
}
MIXTURES = {
    "interleaved": [EVEN, {"quantum_backend": "naive"}, EVEN, {"quantum_backend": "hybrid"}],
    "two_pairs": [
        EVEN | {"num_samples": 5},
        EVEN | {"num_samples": 5},
        {"quantum_backend": "exact"},
        {"quantum_backend": "exact"},
    ],
    "control_variates": [EVEN | {"control_variate": cv} for cv in (True, False, False, True)],
    "every_head_another": [
        {"quantum_backend": "hybrid", "control_variate": False},
        {"quantum_backend": "tree"},
        {"quantum_backend": "exact", "precision": "auto"},
        EVEN | {"num_samples": 9},
    ],
    "samples_alone": [EVEN | {"num_samples": n} for n in (3, 17, 8, 40)],
}


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MIXTURES)
def test_each_head_is_that_of_a_module_with_its_settings(name, mask, backend):
    heads = MIXTURES[name]
    shared = {"num_samples": 7, "backend": backend}
    got = attend(module(heads=heads, **shared), MASKS[mask])
    settings = [{k: v for k, v in own.items() if k != "num_samples"} for own in heads]
    groups = [settings.index(own) for own in settings]
    for head, own in enumerate(heads):
        members = [h for h in range(HEADS) if groups[h] == groups[head]]
        order = members + [h for h in range(HEADS) if h not in members]
        layer = LAYER + GROUP * sorted(set(groups)).index(groups[head])
        whole = module(order, layer, **read_by(own["quantum_backend"], shared) | own)
        want = attend(whole, MASKS[mask], order)
        torch.testing.assert_close(got[:, :, head], want[:, :, members.index(head)], rtol=0, atol=1e-6)


def test_groups_do_not_draw_alike():
    """Two heads on equal projections whose settings differ in what is the same for their strategy."""
    made = module([0, 0, 0, 0], heads=[EVEN | {"num_samples": 4, "precision": p} for p in ("fp32", "auto") * 2])
    y = attend(made)
    for a in range(HEADS):
        for b in range(a):
            assert (y[:, :, a] - y[:, :, b]).abs().max() > 1e-3
    assert len(made.head_groups) == 2


def test_weights_are_in_the_order_of_the_heads():
    mixed = module(heads=MIXTURES["interleaved"], num_samples=7)
    classical = module(quantum_backend="classical")
    x = rows(2, KEYS, WIDTH)
    for average in (True, False):
        got, want = (m(x, x, x, average_attn_weights=average)[1] for m in (mixed, classical))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_gradients_of_heads_with_settings_of_their_own():
    """Every key is read: the gradient is the classical one, whatever the groups."""
    own = [{"quantum_backend": "exact"}, {"num_samples": 50}, {"quantum_backend": "exact"}, {"num_samples": 60}]
    found = []
    for made in (module(heads=own), module(quantum_backend="classical")):
        x = rows(2, KEYS, WIDTH).requires_grad_()
        y, weights = made(x, x, x, average_attn_weights=False)
        (y.square().sum() + weights.square().sum()).backward()
        found.append([x.grad, *(p.grad for p in made.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


STRATEGIES = ["exact", "naive", "stratified", "adaptive", "hybrid", "tree"]


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_grouped_heads(strategy, backend):
    """Query heads that share a key head draw by their own number, as with the key head repeated; in 3-D as in 4-D."""
    q, k, v = rows(2, 6, 9, 8), rows(2, 2, 33, 8, seed=1), rows(2, 2, 33, 5, seed=2)
    mask = rows(2, 6, 9, 33, seed=3) > -1
    options = {"strategy": strategy, "num_samples": [4, 5, 6, 7, 8, 9], "seed": 5, "layer": 2, "backend": backend}
    options = read_by(strategy, options)
    got = quantum_attention(q, k, v, mask, **options)
    repeated = quantum_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), mask, **options)
    torch.testing.assert_close(got, repeated, rtol=0, atol=1e-6)
    joined = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    three_d = quantum_attention(*joined, mask, q_num_heads=6, kv_num_heads=2, **options)
    torch.testing.assert_close(three_d.unflatten(-1, (6, 5)).transpose(1, 2), got, rtol=0, atol=1e-6)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    off = (got - exact).abs().max()
    assert off < 1e-5 if strategy in ("exact", "tree") else off > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_kernel_and_reference_agree_on_a_module(strategy):
    settings = read_by(strategy, {"quantum_backend": strategy, "num_samples": 6, "adaptive_samples": False})
    a, b = (attend(module(backend=name, **settings), batch=3) for name in ("kernel", "reference"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
