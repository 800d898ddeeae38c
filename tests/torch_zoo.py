"""Small torch modules with random weights: every callable returns what `qexport convert tests.torch_zoo:NAME` takes."""

import torch
from torch import nn
from torch.nn import functional

VOCAB, WIDTH, HEADS = 50, 32, 4


class Block(nn.Module):
    """Self-attention with scaled_dot_product_attention, or written out (`eager`)."""

    def __init__(self, causal=False, eager=False):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.causal, self.eager = causal, eager

    def forward(self, x, mask=None):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        if self.eager:
            scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
            y = torch.softmax(scores if mask is None else scores.masked_fill(~mask, -1e9), -1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).reshape(b, n, WIDTH))


class Encoder(nn.Module):
    """Two blocks over token ids, with a padding mask (b, n) where `masked`."""

    def __init__(self, masked=False, **block):
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block(**block) for _ in range(2))
        self.masked = masked

    def forward(self, input_ids, attention_mask=None):
        mask = attention_mask[:, None, None, :].bool() if self.masked else None
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x, mask)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def ids(batch=2, length=7):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def encoder():
    torch.manual_seed(0)
    return Encoder(), (ids(),)


def causal():
    torch.manual_seed(0)
    return Encoder(causal=True), (ids(),)


def masked():
    torch.manual_seed(0)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    return Encoder(masked=True), {"input_ids": ids(), "attention_mask": mask}


def eager():
    torch.manual_seed(0)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    return Encoder(masked=True, eager=True), {"input_ids": ids(), "attention_mask": mask}


def one_item():
    """An example batch of 1, which torch.export would specialise."""
    torch.manual_seed(0)
    return Encoder(), (ids(batch=1),)


def named_axes():
    torch.manual_seed(0)
    axes = {0: torch.export.Dim("items"), 1: torch.export.Dim("tokens", max=64)}
    return Encoder(), (ids(),), (axes,)


def reversed_inputs():
    """The inputs of `masked` in another order than forward names them."""
    module, inputs = masked()
    return module, dict(reversed(inputs.items()))


class Unused(nn.Module):
    """A block that ignores its second input."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x, extra):
        return self.block(x)


def unused_input():
    torch.manual_seed(0)
    return Unused(), (torch.randn(2, 6, WIDTH), torch.randn(2, 3))


class MultiHead(nn.Module):
    """nn.MultiheadAttention, whose averaged weights are returned when `weights`."""

    def __init__(self, weights=False):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.weights = weights

    def forward(self, x):
        y, p = self.attention(x, x, x, need_weights=True)
        return (y, p) if self.weights else y


def multi_head():
    torch.manual_seed(0)
    return MultiHead(), (torch.randn(2, 6, WIDTH),)


def multi_head_weights():
    torch.manual_seed(0)
    return MultiHead(weights=True), (torch.randn(2, 6, WIDTH),)


def transformer_layer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 64, batch_first=True), (torch.randn(2, 6, WIDTH),)


def wide_layer():
    """A layer whose weights are worth compressing."""
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(64, HEADS, 96, batch_first=True), (torch.randn(2, 6, 64),)


class SplitAndPad(nn.Module):
    """A block between ops whose meaning changed in opset 18."""

    def __init__(self):
        super().__init__()
        self.block = Block(causal=True)

    def forward(self, x):
        left, right = functional.pad(x, (1, 1)).chunk(2, -1)
        return self.block(torch.cat([right[..., :-1], left[..., 1:]], -1)).mean(-1)


def split_and_pad():
    torch.manual_seed(0)
    return SplitAndPad(), (torch.randn(2, 6, WIDTH),)


class Joined(nn.Module):
    """scaled_dot_product_attention over (batch * heads, n, d), causal."""

    def forward(self, x):
        q = x.reshape(x.shape[0] * HEADS, -1, WIDTH // HEADS)
        return functional.scaled_dot_product_attention(q, q + 1, q, is_causal=True)


def joined_heads():
    torch.manual_seed(0)
    return Joined(), (torch.randn(2, HEADS, 6, WIDTH // HEADS),), ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},)


class OneKeyHead(nn.Module):
    """Multi-query attention: the key and value head are broadcast over the query heads."""

    def forward(self, q, kv):
        return functional.scaled_dot_product_attention(q, kv, kv)


def one_key_head():
    torch.manual_seed(0)
    axes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}
    return OneKeyHead(), (torch.randn(2, HEADS, 6, 8), torch.randn(2, 1, 9, 8)), (axes, axes)


class Fixed(nn.Module):
    """A block over exactly 9 patches, by its position table."""

    def __init__(self):
        super().__init__()
        self.places, self.block = nn.Parameter(torch.randn(1, 9, WIDTH)), Block()

    def forward(self, x):
        return self.block(x + self.places)


def fixed_length():
    torch.manual_seed(0)
    return Fixed(), (torch.randn(2, 9, WIDTH),)


class Loud(nn.Module):
    """Prints and warns on every call."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        import warnings

        print("a print of the model")
        warnings.warn("a warning of the model", stacklevel=1)
        return self.block(x)


def loud():
    torch.manual_seed(0)
    return Loud(), (torch.randn(2, 6, WIDTH),)


def no_attention():
    return nn.Linear(4, 4), (torch.randn(2, 4),)


def data_dependent():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else x * 2

    return Branch(), (torch.randn(2, 4),)


def wrong_inputs():
    return Encoder(), (torch.randn(2, 3, 4, 5),)


def raises():
    raise RuntimeError("the weights are on another disk")


def returns_module_only():
    return nn.Linear(2, 2)


def returns_numbers():
    return nn.Linear(2, 2), (1.0, 2.0)


def returns_text():
    return "model", "inputs"


NOT_CALLABLE = 3


class Decoder(nn.Module):
    """Causal blocks over token ids and learned positions, as a language model; `counts` ignores the positions given."""

    def __init__(self, counts=False, causal=True):
        super().__init__()
        self.words, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Block(causal=causal) for _ in range(2))
        self.head, self.counts = nn.Linear(WIDTH, VOCAB), counts

    def forward(self, input_ids, position_ids):
        places = torch.arange(input_ids.shape[1])[None] + 0 * position_ids if self.counts else position_ids
        x = self.words(input_ids) + self.places(places)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _decoder(**options):
    torch.manual_seed(0)
    ids = torch.randint(VOCAB, (2, 24))
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=64)}
    places = torch.arange(24).expand(2, -1).contiguous()
    return Decoder(**options), {"input_ids": ids, "position_ids": places}, {"input_ids": axes, "position_ids": axes}


def decoder():
    return _decoder()


def decoder_that_counts():
    return _decoder(counts=True)


def decoder_that_looks_ahead():
    return _decoder(causal=False)
