"""Other approximations of attention, in torch: Performer and Linformer from their packages, top-k, and uniform sampling.

Each takes torch tensors q, k, v (batch, heads, n, d) and gives (batch, heads, n, d). They are what a user of torch would
write, with the whole score matrix in blocks of queries where they need it: their errors compare, their times are those of
such programs and not the least possible.
"""

import contextlib
import io
from collections.abc import Callable

BLOCK = 256  # queries whose scores are held at a time


@contextlib.contextmanager
def _seeded(seed: int):
    """torch's generator begins at `seed` inside, and goes on outside as if nothing had been drawn."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def performer(features: int | None, head_size: int, causal: bool, seed: int = 0) -> Callable:
    """FAVOR+ of `performer-pytorch` with random orthogonal features, d log d of them when None."""
    with _seeded(seed), contextlib.redirect_stdout(io.StringIO()):  # it prints that its causal form has no CUDA
        from performer_pytorch import FastAttention

        module = FastAttention(head_size, nb_features=features, causal=causal)
    return module.eval()


def linformer(length: int, n: int, heads: int, head_size: int, seed: int = 0) -> Callable:
    """Self-attention of `linformer` over `length` mixtures of the keys and values, without its linear layers; not causal.

    n, the most keys, is fixed with the module. Of fewer keys it mixes those that are there, as if zeros filled the rest.

    The mixtures (n -> length) are meant to be learned together with the model. Trained heads come without them, so they
    are what the package starts from, uniform random: what Linformer is worth on a model that was not trained with it.
    """
    import torch
    from linformer import LinformerSelfAttention

    class Part(torch.nn.Module):
        def __init__(self, place):
            super().__init__()
            self.place = place

        def forward(self, context):
            return context.chunk(2, -1)[self.place]

    with _seeded(seed):
        module = LinformerSelfAttention(heads * head_size, n, k=length, heads=heads).eval()
    module.to_q = module.to_out = torch.nn.Identity()
    module.to_k, module.to_v = Part(0), Part(1)

    class Attend(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, q, k, v):
            q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
            return self.module(q, context=torch.cat([k, v], -1)).unflatten(2, (heads, head_size)).transpose(1, 2)

    return Attend()


def top_k(count: int, tail: bool, causal: bool = False) -> Callable:
    """The `count` most probable keys of each query: renormalised, or with mean V for what is left of the probability."""
    import torch

    def block(q, k, v, means, first):
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if causal:
            scores += torch.full(scores.shape[-2:], -torch.inf, device=scores.device).triu(first + 1)
        best, places = scores.topk(min(count, k.shape[2]), sorted=False)
        p = (best - torch.logsumexp(scores if tail else best, -1, keepdim=True)).exp()
        y = torch.zeros_like(scores).scatter_(-1, places, p) @ v
        return y + (1 - p.sum(-1, keepdim=True)) * means if tail else y

    def attend(q, k, v):
        means = v.mean(2, keepdim=True).expand(v.shape)
        if causal:
            means = v.cumsum(2) / torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
        starts = range(0, q.shape[2], BLOCK)
        return torch.cat([block(q[:, :, i : i + BLOCK], k, v, means[:, :, i : i + BLOCK], i) for i in starts], 2)

    return attend


def uniform(count: int, seed: int = 0) -> Callable:
    """Softmax over `count` keys, or all there are, drawn without replacement, the same for all queries; not causal.

    They are drawn where q is, so that a call on a GPU copies no indices there: a seed draws others than on the CPU.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q, k, v):
        generator = torch.Generator(q.device).manual_seed(seed)
        drawn = torch.randperm(k.shape[2], generator=generator, device=q.device)[:count].sort().values
        return scaled_dot_product_attention(q, k[:, :, drawn], v[:, :, drawn])

    return attend
