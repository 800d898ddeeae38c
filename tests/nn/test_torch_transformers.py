"""Inside nn.Transformer and its parts: torch's fused and nested paths must not go past our forward."""

import pytest
import torch
from torch import nn

from qexport.nn import QuantumMultiheadAttention, replace_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]
WIDTH, HEADS, LENGTH = 16, 2, 24
LAYER = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 24, "batch_first": True}
PADDING = torch.arange(LENGTH) >= torch.tensor([LENGTH, 17, 3])[:, None]


@pytest.fixture
def calls(monkeypatch):
    """Counts what our attention computes."""
    counted = []
    attend = QuantumMultiheadAttention._attend
    monkeypatch.setattr(QuantumMultiheadAttention, "_attend", lambda self, *a: counted.append(self) or attend(self, *a))
    return counted


def encoder(**options):
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER | options), 2).eval()


def source():
    return torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(calls, grad, norm_first):
    layer = encoder(norm_first=norm_first).layers[0]
    with torch.set_grad_enabled(grad):
        want = layer(source())
        assert replace_attention(layer, {"strategy": "exact"}) == ["self_attn"]
        got = layer(source())
    assert len(calls) == 1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_layer_that_is_built_around_ours(calls):
    """Without replace_attention: the module put into the layer by hand, before the encoder decides on its paths."""
    layer = nn.TransformerEncoderLayer(**LAYER)
    layer.self_attn = QuantumMultiheadAttention(WIDTH, HEADS, batch_first=True, quantum_backend="exact")
    stack = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        stack(source(), src_key_padding_mask=PADDING)
    assert len(calls) == 2


def test_padded_encoder_takes_the_nested_path_through_our_forward(calls, monkeypatch):
    stack = encoder()
    assert stack.use_nested_tensor
    nested = []
    forward = QuantumMultiheadAttention._forward_nested
    monkeypatch.setattr(QuantumMultiheadAttention, "_forward_nested", lambda *a: nested.append(a[0]) or forward(*a))
    with torch.no_grad():
        want = stack(source(), src_key_padding_mask=PADDING)
        replace_attention(stack, {"strategy": "exact"})
        got = stack(source(), src_key_padding_mask=PADDING)
        sampled = encoder()
        replace_attention(sampled, {"strategy": "stratified", "num_samples": 4})
        other = sampled(source(), src_key_padding_mask=PADDING)
    assert len(calls) == 4
    assert len(nested) == 4
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (got[PADDING] == 0).all(), "torch's nested path leaves zeros there"
    assert (other - want)[~PADDING].abs().max() > 1e-3
    assert (other[PADDING] == 0).all()


def test_nested_draws_are_those_of_the_padded_batch():
    torch.manual_seed(2)
    module = QuantumMultiheadAttention(WIDTH, HEADS, batch_first=True, num_samples=4).eval()
    x = source().masked_fill(PADDING[..., None], 0)
    with torch.no_grad():
        nested = torch._nested_tensor_from_mask(x, ~PADDING)
        got = module(nested, nested, nested, need_weights=False)[0].to_padded_tensor(0.0)
        want = module(x, x, x, key_padding_mask=PADDING, need_weights=False)[0]
    assert torch.equal(got, want.masked_fill(PADDING[..., None], 0))
    with pytest.raises(AssertionError, match="nested tensors are for self-attention"):
        module(nested, nested, nested)


@pytest.mark.parametrize("batch_first", [True, False])
def test_decoder_layer(calls, batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(**LAYER | {"batch_first": batch_first}).eval()
    target, memory = source(), source()[:, :9] + 1
    if not batch_first:
        target, memory = target.transpose(0, 1), memory.transpose(0, 1)
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(LENGTH),
        "tgt_is_causal": True,
        "memory_key_padding_mask": PADDING[:, -9:] & (torch.arange(9) > 0),
    }
    with torch.no_grad():
        want = layer(target, memory, **masks)
        assert replace_attention(layer, {"strategy": "exact"}) == ["self_attn", "multihead_attn"]
        got = layer(target, memory, **masks)
    assert len(calls) == 2
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_transformer(calls):
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 24, batch_first=True).eval()
    target = source()[:, :11]
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(11),
        "src_key_padding_mask": PADDING,
        "memory_key_padding_mask": PADDING,
    }
    with torch.no_grad():
        want = model(source(), target, **masks)
        names = replace_attention(model, {"strategy": "exact"})
        got = model(source(), target, **masks)
    assert len(names) == len(calls) == 6
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert [m.layer for m in model.modules() if isinstance(m, QuantumMultiheadAttention)] == list(range(6))
    model.train()
    model(source(), target, **masks).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
