"""Small torch modules around qexport.nn: callables for `qexport.convert("nn_zoo:NAME")`, and the models they wrap."""

import torch
from torch import nn

from qexport.nn import (
    QuantumMultiheadAttention,
    quantum_attention,
    quantum_measure,
    quantum_noise,
    quantum_overlap,
    replace_attention,
)

WIDTH, HEADS, LENGTH = 32, 4, 24
AXES = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}


def attention(**settings):
    settings = {"num_samples": 6, "seed": 5, "layer": 2, "batch_first": True} | settings
    return QuantumMultiheadAttention(WIDTH, HEADS, **settings)


def rows(length=LENGTH, batch=3, seed=0):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))


class SelfAttention(nn.Module):
    """Self-attention; where `weights`, their mean over heads is an output too."""

    def __init__(self, weights=False, **settings):
        super().__init__()
        self.attention, self.weights = attention(**settings), weights

    def forward(self, x, padding=None):
        y, p = self.attention(x, x, x, key_padding_mask=padding, need_weights=self.weights)
        return (x + y, p) if self.weights else x + y


class CrossAttention(nn.Module):
    """From x to memory under a mask (queries, keys)."""

    def __init__(self, **settings):
        super().__init__()
        self.attention = attention(**settings)

    def forward(self, x, memory, mask=None):
        return self.attention(x, memory, memory, attn_mask=mask, need_weights=False)[0]


class Causal(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention = attention(**settings)

    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return x + self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def padding(length=LENGTH, batch=3):
    return torch.arange(length) >= torch.tensor([length, length - 7, 9])[:batch, None]


def plain():
    torch.manual_seed(0)
    return SelfAttention(), (rows(),), (AXES,)


def length_first():
    """batch_first False: the axes are (length, batch)."""
    torch.manual_seed(0)
    return SelfAttention(batch_first=False), (rows().transpose(0, 1).contiguous(),), (AXES,)


def weights():
    torch.manual_seed(0)
    return SelfAttention(weights=True), (rows(),), (AXES,)


def padded():
    torch.manual_seed(0)
    return SelfAttention(), (rows(), padding()), (AXES, AXES)


def cross():
    torch.manual_seed(0)
    return CrossAttention(), (rows(9), rows(seed=1)), (AXES, {0: AXES[0], 1: torch.export.Dim.AUTO})


def cross_float_mask():
    torch.manual_seed(0)
    bias = torch.randn(9, LENGTH).masked_fill(torch.rand(9, LENGTH) < 0.3, -torch.inf)
    return CrossAttention(quantum_backend="naive"), (rows(9), rows(seed=1), bias), (AXES, AXES, AXES)


def causal():
    torch.manual_seed(0)
    return Causal(adaptive_samples=False), (rows(),), (AXES,)


def added_keys():
    torch.manual_seed(0)
    return SelfAttention(add_bias_kv=True, add_zero_attn=True), (rows(), padding()), (AXES, AXES)


def heads():
    torch.manual_seed(0)
    own = [{"num_samples": 3}, {"quantum_backend": "hybrid"}, {"num_samples": 8}, {"quantum_backend": "exact"}]
    return SelfAttention(heads=own, adaptive_samples=False), (rows(),), (AXES,)


def classical_module():
    torch.manual_seed(0)
    return SelfAttention(quantum_backend="classical"), (rows(),), (AXES,)


def _encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True), 2).eval()


class Padded(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)


def encoder():
    """torch's own, with padding: its fused path leaves zeros where a batch is padded, its export does not."""
    return Padded(_encoder()), (rows(), padding()), (AXES, AXES)


def replaced_encoder():
    model, *rest = encoder()
    replace_attention(model, {"strategy": "stratified", "num_samples": 6, "seed": 5})
    return model, *rest


class Mixed(nn.Module):
    """torch's scaled_dot_product_attention, then ours, whose layer 0 is the number of the first site too."""

    def __init__(self):
        super().__init__()
        self.ours = attention(layer=0)

    def forward(self, x):
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return y + self.ours(x, x, x, need_weights=False)[0]


def mixed():
    torch.manual_seed(0)
    return Mixed(), (rows(),), (AXES,)


class Grouped(nn.Module):
    """The function itself, with grouped heads, a soft cap and a scale."""

    def forward(self, x):
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        y = quantum_attention(q, q[:, :2], q[:, 2:], seed=4, num_samples=[3, 4, 5, 6], softcap=3.0, scale=0.5, layer=7)
        return y.transpose(1, 2).flatten(2)


def grouped():
    return Grouped(), (rows(),), (AXES,)


class SeedInput(nn.Module):
    def forward(self, x, seed):
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return quantum_attention(q, q, q, seed=seed, num_samples=3).transpose(1, 2).flatten(2)


def seed_input():
    return SeedInput(), (rows(), torch.tensor(3)), (AXES, {})


def half():
    model, inputs, axes = plain()
    return model.half(), tuple(x.half() for x in inputs), axes


class NoisyAttention(nn.Module):
    """Attention as a noisy device computes it, spelt out with the functions of qexport.nn, behind one that is sampled."""

    def __init__(self):
        super().__init__()
        self.sampled = attention()
        self.queries, self.keys = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.level = nn.Parameter(torch.tensor(0.05))

    def forward(self, x):
        x = x + self.sampled(x, x, x, need_weights=False)[0]
        p = (self.queries(x) @ self.keys(x).mT).softmax(-1)
        p, leak = quantum_noise(p, self.level, channel="amplitude_damping")
        p, _ = quantum_noise(p / p.sum(-1, keepdim=True), 0.02, channel="readout", renormalize=1)
        overlaps = quantum_overlap(x, x, self.level, channel="phase_damping")
        return quantum_measure(p, 7, shots=50, layer=9) @ x, leak, overlaps


def noisy():
    torch.manual_seed(0)
    return NoisyAttention().eval(), (rows(),), (AXES,)
