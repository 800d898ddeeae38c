"""QuantumMultiheadAttention against nn.MultiheadAttention: everything that torch documents of the latter.

`classical` is torch's own attention; `exact`, and a strategy that may read every key, must give its numbers up to rounding.
"""

import copy
import pickle

import pytest
import torch
from drop_in import BATCH, CASES, HEADS, KEYS, QUERIES, SETTINGS, TOLERANCE, WIDTH, assert_same, call, modules
from torch import nn

from qexport.nn import QuantumMultiheadAttention

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_forward(name, setting):
    arguments, case = CASES[name]
    theirs, ours = modules(setting, **arguments)
    inputs, masks = call(theirs, **case)
    for more in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        with torch.no_grad():
            assert_same(ours(*inputs, **masks, **more), theirs(*inputs, **masks, **more))


@pytest.mark.parametrize("setting", SETTINGS)
def test_added_keys_are_seen_by_causal_queries(setting):
    """As torch does where it uses the mask; without weights and padding it goes by the flag, which hides added keys."""
    theirs, ours = modules(setting, add_bias_kv=True, add_zero_attn=True)
    inputs, masks = call(theirs, self=True, causal=True)
    with torch.no_grad():
        want = theirs(*inputs, **masks)
        assert_same(ours(*inputs, **masks), want)
        if setting != "classical":
            assert_same(ours(*inputs, **masks, need_weights=False), (want[0], None))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("strategy", ["stratified", "naive", "hybrid"])
def test_causal_queries_do_not_look_ahead(strategy, added):
    """Not by what they draw either: at one seed, later keys and values change nothing before them."""
    torch.manual_seed(0)
    settings = {"quantum_backend": strategy, "num_samples": 3, "adaptive_samples": False, "batch_first": True}
    module = QuantumMultiheadAttention(WIDTH, HEADS, add_bias_kv=added, **settings).eval()
    x = torch.randn(1, 30, WIDTH)
    later = torch.cat([x[:, :20], torch.randn(1, 10, WIDTH)], 1)
    mask = torch.ones(30, 30, dtype=torch.bool).triu(1)
    with torch.no_grad():
        a, b = (module(y, y, y, attn_mask=mask, is_causal=True, need_weights=False)[0] for y in (x, later))
    torch.testing.assert_close(a[:, :20], b[:, :20], rtol=0, atol=1e-6)
    assert (a - b)[:, 20:].abs().max() > 0.01


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["self", "kdim_vdim", "both_added", "both_float", "bool_mask_float_padding", "causal"])
def test_gradients_where_every_key_is_read(name, setting):
    """Of all inputs and parameters, through the output and through the weights."""
    arguments, case = CASES[name]
    found = []
    for module in modules(setting, **arguments):
        inputs, masks = call(module, **case)
        leaves = [x.requires_grad_() for x in dict.fromkeys(inputs)]
        output, weights = module(*inputs, **masks, average_attn_weights=False)
        loss = (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum() + (weights**2).sum()
        loss.backward()
        found.append([x.grad for x in leaves] + [p.grad for p in module.parameters()])
    assert any(g.abs().max() > 0.1 for g in found[1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("setting", ["classical", "exact-reference", "stratified-reference", "exact-kernel"])
def test_types(setting, dtype):
    if "kernel" in setting and dtype == torch.float64:
        pytest.skip("the kernels have no float64, which test_nn_errors.py asserts")
    theirs, ours = modules(setting, dtype=dtype)
    inputs, masks = call(theirs, dtype, attn="float", padding="float")
    with torch.no_grad():
        got = ours(*inputs, **masks)
        assert got[0].dtype == got[1].dtype == dtype
        assert_same(got, theirs(*inputs, **masks), dtype)
        # a module that is moved afterwards
        _, moved = modules(setting)
        moved.to(dtype).load_state_dict(theirs.state_dict())
        assert moved.seed.dtype == torch.int64, "rounding would change the draws"
        assert_same(moved(*inputs, **masks), theirs(*inputs, **masks), dtype)


@pytest.mark.parametrize("arguments", [{}, {"kdim": 6, "vdim": 8}, {"add_bias_kv": True}, {"bias": False}], ids=str)
def test_state_dicts_both_ways(arguments):
    theirs = nn.MultiheadAttention(WIDTH, HEADS, **arguments)
    ours = QuantumMultiheadAttention(WIDTH, HEADS, seed=3, **arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert ours.load_state_dict(theirs.state_dict(), strict=True) == theirs.load_state_dict(ours.state_dict(), strict=True)
    shared = QuantumMultiheadAttention.from_classical(theirs, seed=5)
    assert [p.data_ptr() for p in shared.parameters()] == [p.data_ptr() for p in theirs.parameters()]
    assert shared.seed == 5


def test_constructors_take_the_same_arguments():
    torch.manual_seed(4)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, 0.1, True, True, True, 6, 8, True, "cpu", torch.float64)
    torch.manual_seed(4)
    ours = QuantumMultiheadAttention(WIDTH, HEADS, 0.1, True, True, True, 6, 8, True, "cpu", torch.float64)
    for name in ("embed_dim", "num_heads", "head_dim", "dropout", "kdim", "vdim", "batch_first", "add_zero_attn"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), f"{name} begins otherwise"
    for wrong in ({"embed_dim": 10, "num_heads": 3}, {"embed_dim": 0, "num_heads": 1}, {"embed_dim": 4, "num_heads": 0}):
        with pytest.raises(Exception) as theirs:  # noqa: PT011
            nn.MultiheadAttention(**wrong)
        with pytest.raises(type(theirs.value), match=str(theirs.value)[:20]):
            QuantumMultiheadAttention(**wrong)


@pytest.mark.parametrize("setting", ["classical", "stratified-kernel"])
def test_copies(setting, tmp_path):
    """deepcopy, pickle and torch.save keep parameters, settings and draws."""
    _, module = modules(setting)
    sampled = QuantumMultiheadAttention(WIDTH, HEADS, num_samples=2, seed=9, layer=4, heads=[{"num_samples": 1}] * HEADS)
    x = torch.randn(BATCH, 4, WIDTH)
    for original in (module, sampled.eval()):
        torch.save(original, tmp_path / "module.pt")
        loaded = torch.load(tmp_path / "module.pt", weights_only=False)
        for other in (copy.deepcopy(original), pickle.loads(pickle.dumps(original)), loaded):
            assert torch.equal(other(x, x, x)[0], original(x, x, x)[0])
            assert (other.seed, other.layer, repr(other)) == (original.seed, original.layer, repr(original))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_queries_without_a_key_get_zero_where_torch_gives_nan(setting, kind):
    theirs, ours = modules(setting)
    inputs, _ = call(theirs)
    hidden = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    hidden[1] = True
    padding = hidden if kind == "bool" else torch.zeros(BATCH, KEYS).masked_fill(hidden, -torch.inf)
    with torch.no_grad():
        got, weights = ours(*inputs, key_padding_mask=padding)
        want, their_weights = theirs(*inputs, key_padding_mask=padding)
    assert want[:, 1].isnan().all()
    assert their_weights[1].isnan().all()
    if setting == "classical":
        assert got[:, 1].isnan().all()
        return
    assert torch.equal(got[:, 1], theirs.out_proj.bias.expand(QUERIES, WIDTH)), "attention of 0, projected"
    assert (weights[1] == 0).all()
    seen = [0, 2]
    assert_same((got[:, seen], weights[seen]), (want[:, seen], their_weights[seen]))


def test_dropout_in_training():
    """`classical` drops as torch does; the others by the seed of the draw, with the same mean (test_gradients.py)."""
    theirs, ours = modules("classical", dropout=0.5)
    inputs, _ = call(theirs)
    torch.manual_seed(6)
    want = theirs.train()(*inputs)
    torch.manual_seed(6)
    assert_same(ours.train()(*inputs), want)
    theirs, exact = modules("exact-reference", dropout=0.5)
    calm = theirs(*inputs)[0]
    exact.train()
    torch.manual_seed(6)
    first, weights = exact(*inputs)
    second = exact(*inputs)[0]
    torch.manual_seed(6)
    assert torch.equal(exact(*inputs)[0], first), "torch.manual_seed repeats it"
    assert (first - second).abs().max() > 0.1
    assert (first - calm).abs().max() > 0.1
    torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, QUERIES))  # those that are dropped from


def test_different_heads_drop_differently():
    """Two groups of settings with equal keys, values and queries: their dropped weights must not coincide."""
    heads = [{"quantum_backend": "exact"}, {"quantum_backend": "stratified", "num_samples": 99, "adaptive_samples": False}]
    module = QuantumMultiheadAttention(16, 2, dropout=0.5, heads=heads, batch_first=True).train()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.eye(16) if name == "out_proj.weight" else torch.zeros_like(parameter))
        module.in_proj_weight[:] = torch.eye(8).repeat(6, 2) / 2
    y = module(*[torch.randn(1, 12, 16)] * 3, need_weights=False)[0]
    assert (y[..., :8] - y[..., 8:]).abs().max() > 0.01
    module.eval()
    y = module(*[torch.randn(1, 12, 16)] * 3, need_weights=False)[0]
    torch.testing.assert_close(y[..., :8], y[..., 8:], rtol=0, atol=1e-5)


def test_tree_drops_too():
    """Large enough for tree to build clusters (256 keys, 32 queries), which have no weights to drop."""
    module = QuantumMultiheadAttention(8, 1, dropout=0.9, quantum_backend="tree", num_samples=32, batch_first=True).train()
    calm = copy.deepcopy(module)
    calm.dropout = 0.0
    x = torch.randn(1, 512, 8)
    with torch.no_grad():
        dropped, kept = (m(x, x, x, need_weights=False)[0] - m.out_proj.bias for m in (module, calm))
    assert dropped.norm() > 1.2 * kept.norm(), "noise of the dropout: a factor 10 on a tenth of the weights"


def test_training_draws_anew_and_evaluation_does_not():
    module = QuantumMultiheadAttention(WIDTH, HEADS, num_samples=2)
    x = torch.randn(20, 2, WIDTH)

    def run():
        return module(x, x, x, need_weights=False)[0]

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)
    module.eval()
    assert torch.equal(run(), run())
    with torch.no_grad():
        assert torch.equal(run(), module(x, x, x, need_weights=False)[0])
    still = run()
    module.seed += 1
    assert not torch.equal(run(), still)


def test_strided_inputs_and_frozen_parameters():
    theirs, ours = modules("exact-kernel", batch_first=True)
    ours.requires_grad_(False)
    wide = torch.randn(BATCH, QUERIES, 2 * WIDTH)
    x = wide[..., ::2]
    with torch.no_grad():
        assert_same(ours(x, x, x), theirs(x, x, x))
    y = ours(x, x, x)[0]
    assert not y.requires_grad
