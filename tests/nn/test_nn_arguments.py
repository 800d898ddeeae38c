"""What the functions and modules of qexport.nn say to arguments of another type, and to what they would ignore."""

import re

import pytest
import torch
from torch import nn

from qexport.errors import UsageError
from qexport.nn import QuantumMultiheadAttention, number_layers, quantum_attention, quantum_measure, replace_attention

WIDTH, HEADS = 16, 4


def rows(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("place", range(4))
def test_what_is_no_tensor(place):
    """Arrays of numpy and lists, in every place."""
    q, mask = rows(1, 2, 3, 4), torch.ones(3, 3, dtype=torch.bool)
    x = rows(5, 2, WIDTH)
    for tensors, names, call in (
        ([q, q, q, mask], ("Q", "K", "V", "attn_mask"), quantum_attention),
        (
            [x, x, x, torch.zeros(2, 5)],
            ("query", "key", "value", "key_padding_mask"),
            QuantumMultiheadAttention(WIDTH, HEADS),
        ),
        ([x, x, x, None], ("query", "key", "value"), QuantumMultiheadAttention(WIDTH, HEADS, quantum_backend="classical")),
    ):
        for other, kind, maker in ((q.numpy(), "numpy.ndarray", "from_numpy"), ([[1.0]], "list", "as_tensor")):
            if place < len(names):
                arguments = [*tensors[:place], other, *tensors[place + 1 :]]
                words = f"{names[place]} must be a torch.Tensor, got {kind}; give torch.{maker}({names[place]})"
                with pytest.raises(UsageError, match=f"^{re.escape(words)}$"):
                    call(*arguments)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 1.5, "1", True, torch.tensor(0.5), torch.tensor([1, 2])])
def test_seeds_that_are_no_int64(seed):
    q, p = rows(1, 2, 3, 4), torch.full((2, 4), 0.25)
    for call in (lambda: quantum_attention(q, q, q, seed=seed), lambda: quantum_measure(p, seed)):
        with pytest.raises(UsageError, match=r"^seed must be (a whole number of 64 bits, .*|one number of int64), got"):
            call()


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), torch.tensor(-1), torch.tensor([7])])
def test_seeds_at_the_limits(seed):
    q = rows(1, 2, 40, 4)
    drawn = [quantum_attention(q, q, q, seed=seed, num_samples=3, backend=name) for name in ("kernel", "reference")]
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-5)
    QuantumMultiheadAttention(WIDTH, HEADS, seed=int(seed))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: replace_attention(5), "model must be a torch.nn.Module, got int"),
        (lambda: number_layers("model"), "model must be a torch.nn.Module, got str"),
        (lambda: QuantumMultiheadAttention.from_classical(nn.Linear(2, 2)), "takes an nn.MultiheadAttention, got Linear"),
        (
            lambda: replace_attention(nn.TransformerEncoderLayer(WIDTH, HEADS), {"compress": {"ratio": 4}}),
            "compress is for converted models: leave it out here and give it to qexport.compress",
        ),
    ],
)
def test_models_and_recipes(call, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        call()


@pytest.mark.parametrize(
    ("attributes", "kind", "words"),
    [
        ({"left_window_size": 2}, UsageError, "has no attribute 'left_window_size' in torch; known: strategy, num_samples"),
        ({"num_samples": 2.5}, UsageError, "num_samples must be of kind ints, got 2.5"),
        ({"num_samples": "12"}, UsageError, "num_samples must be of kind ints, got '12'"),
        ({"layer": 2**32}, UsageError, "layer must be <= 4294967295, got 4294967296"),
        ({"scale": "0.5"}, UsageError, "scale must be of kind float, got '0.5'"),
        ({"dropout_p": "x"}, UsageError, "dropout_p must be a number, got 'x'"),
        ({"dropout_p": 2}, ValueError, "dropout_p must be from 0 to 1, got 2"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be from 0 to 1, got nan"),
        ({"q_num_heads": 3}, ValueError, "q_num_heads and kv_num_heads are 3 and 2, but got Q (1, 2, 3, 4), K"),
        ({"attn_mask": torch.ones(3, 3, dtype=torch.int64)}, ValueError, "attn_mask must be bool (true = attend) or float"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_what_would_be_ignored_or_misread(attributes, kind, words, grad):
    q = rows(1, 2, 3, 4).requires_grad_(grad)
    with pytest.raises(kind, match=re.escape(words)):
        quantum_attention(q, q, q, **attributes)


def test_need_weights_is_a_truth():
    q, x = rows(1, 2, 3, 4), rows(5, 2, WIDTH)
    assert len(quantum_attention(q, q, q, need_weights="yes")) == 2
    with torch.no_grad():
        assert QuantumMultiheadAttention(WIDTH, HEADS)(x, x, x, need_weights="yes")[1].shape == (2, 5, 5)


@pytest.mark.parametrize("backend", ["kernel", "reference"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (1, 2, 3, 1), (3, 7), (2, 1, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_broadcast_as_torchs(backend, grad, shape, dtype):
    """Along the keys, too, where the op itself takes a short mask for one of the first keys."""
    q, k, v = (rows(2, 2, n, 8) for n in (3, 7, 7))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    mask = mask < 0.7 if dtype == torch.bool else mask
    found = quantum_attention(q.clone().requires_grad_(grad), k, v, mask, strategy="exact", backend=backend)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, mask.expand(2, 2, 3, 7)).nan_to_num()
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", ["exact", "stratified"])
def test_dropping_everything_leaves_nothing(strategy):
    q = rows(1, 2, 3, 4).requires_grad_()
    found = quantum_attention(q, q, q, strategy=strategy, dropout_p=1.0)
    found.sum().backward()
    assert (found == 0).all()
    assert (q.grad == 0).all()
