"""What the strategies that sample draw, in torch, and the estimate that a draw makes: docs/math.md, "Strategies"."""

import itertools
from dataclasses import dataclass

import torch

from qexport.ops.clusters_ref import leaves
from qexport.ops.philox import philox4x32

T = 1 << 24  # one stratum of the fixed-point inclusion probabilities
CDF_ONE = 1 << 30  # the whole distribution in the fixed-point CDF of `naive`


@dataclass(frozen=True)
class Draws:
    """What was drawn for the rows of p: constants, through which no gradient flows.

    importance: (batch, heads, q_len, keys): key j enters with weight p_j * importance_j: 1 where it is taken for certain,
        1 / its inclusion probability where it was drawn, 0 where it was not.
    cluster: (batch, heads, keys) int64: keys with one number share the mean of their values as control variate; None where
        there is none.
    one_mean: whether all keys in use are one cluster.
    """

    importance: torch.Tensor
    cluster: torch.Tensor | None
    one_mean: bool = False


def combine(p, V, draws: Draws, kept=None):
    """The estimate of sum_j p_j v_j, differentiable in p and V; shapes as in `draw`. `kept`: factors of dropout, as p.

    With c_j the mean value of j's cluster: sum_j p_j importance_j (v_j - c_j) + sum_j p_j c_j, whose gradient is an unbiased
    estimate of the exact one where importance is unbiased for 1. Without control variate it is the ratio of two such sums
    (Hajek).
    """
    weights = p * draws.importance
    if draws.cluster is None:
        total = weights.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        return (weights if kept is None else weights * kept) @ V / total
    if kept is not None:
        p, weights = p * kept, weights * kept
    centre = _centres(V, draws.cluster)
    if draws.one_mean and V.shape[2]:  # c_j is the same for all keys with p_j > 0, and the second sum a product
        centre = centre[:, :, :1]
        return weights @ (V - centre) + p.sum(-1, keepdim=True) * centre
    return weights @ (V - centre) + p @ centre


def draw(p, V, allowed, valid, seed, a) -> Draws:
    """The draws of one call of a strategy that samples.

    Args:
        p: (batch, heads, q_len, keys), probabilities.
        V: (batch, heads, keys, v_head_size), 0 at the keys behind `valid`.
        allowed: bool, broadcastable to p.
        valid: (batch,) int64, how many keys are in use.
        a: attributes of the op table.
    """
    p, V = p.detach(), V.detach()
    batch, heads, q_len, n_keys = p.shape
    n_allowed = allowed.sum(-1, keepdim=True).expand(batch, heads, q_len, 1)
    samples = torch.tensor(a["num_samples"], dtype=p.dtype, device=p.device).expand(heads)[None, :, None, None]
    samples = samples.expand(batch, heads, q_len, 1)
    # Means of values hold later ones, which a causal query must not see.
    centred = bool(a["control_variate"]) and not a["is_causal"]
    if a["strategy"] == "hybrid" and centred:
        cluster = _value_clusters(V, valid)
        size = p * torch.linalg.vector_norm(V - _centres(V, cluster), dim=-1)[:, :, None, :]
        read = _largest(size, samples) & (size > 0) | (samples >= n_allowed)
        return Draws(read.to(p.dtype), cluster)
    cluster, size = None, p
    if centred:
        cluster = (torch.arange(n_keys, device=p.device) >= valid[:, None]).long()[:, None].expand(batch, heads, n_keys)
        size = p * torch.linalg.vector_norm(V - _centres(V, cluster), dim=-1)[:, :, None, :]
    if a["strategy"] == "naive":
        return Draws(_naive_importance(p, size, a["num_samples"], seed, a["layer"], centred), cluster, centred)
    budget, always = samples, None
    if a["strategy"] == "adaptive":
        budget = _share_budget(p, samples, n_allowed)
    elif a["strategy"] == "hybrid":
        top = samples // 2
        always = _largest(p, top) & allowed
        budget = samples - top
    importance = _systematic_importance(size, budget, always, seed, a["layer"])
    total = samples if a["strategy"] == "hybrid" else budget
    return Draws(importance.masked_fill_(total >= n_allowed, 1), cluster, centred)


def _largest(size, count):
    """Which are the `count` largest of each row; ties: the lower index."""
    return size.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) < count


def _value_clusters(V, valid):
    """Clusters of `hybrid` with control variate: (batch, heads, keys) numbers; keys not in use share the last one."""
    number = torch.full(V.shape[:3], V.shape[2], device=V.device)
    for b, h in itertools.product(*map(range, V.shape[:2])):
        for i, members in enumerate(leaves(V[b, h], torch.arange(min(int(valid[b]), V.shape[2])))):
            number[b, h, members] = i
    return number


def _centres(V, cluster):
    """The mean value of the cluster of every key: (batch, heads, keys, v_head_size)."""
    index = cluster[..., None].expand_as(V)
    sums = V.new_zeros(*V.shape[:2], V.shape[2] + 2, V.shape[3]).scatter_add(2, index, V)
    counts = V.new_zeros(*V.shape[:2], V.shape[2] + 2).scatter_add(2, cluster, torch.ones_like(V[..., 0]))
    return (sums / counts.clamp(min=1)[..., None]).gather(2, index)


def _counter(p):
    """Row number b * heads + h and query index of every row of p, shaped (batch, heads, q_len)."""
    batch, heads, q_len, _ = p.shape
    return torch.arange(batch * heads, device=p.device).reshape(batch, heads, 1), torch.arange(q_len, device=p.device)


def _naive_importance(p, size, num_samples, seed, layer, control_variate):
    """S draws with replacement, in proportion to `size`: the importance of each key after all of them."""
    row, query = _counter(p)
    heads = p.shape[1]
    total = size.sum(-1, keepdim=True)
    f = torch.where(size > 0, (CDF_ONE * size / total).floor() + 1, 0).long()
    F = f.cumsum(-1)
    share = torch.zeros_like(p)  # of the draws
    for h in range(heads):
        S = num_samples[h % len(num_samples)]
        for k in range(S):
            word = philox4x32(seed, layer, row, query, torch.tensor(k // 4, device=p.device))[:, h, :, k % 4]
            t = (word * F[:, h, :, -1]) >> 32
            j = torch.searchsorted(F[:, h].contiguous(), t[..., None], right=True).clamp(max=p.shape[-1] - 1)
            share[:, h].scatter_add_(-1, j, torch.full_like(j, 1 / S, dtype=p.dtype))
    # Without control variate the probability is p itself, and every draw counts alike.
    inverse = F[..., -1:] / f.clamp(min=1).to(p.dtype) if control_variate else 1 / p.clamp(min=torch.finfo(p.dtype).tiny)
    return torch.where(total > 0, share * inverse, 0)


def inclusion_scale(size, budget):
    """c with sum_j min(1, c size_j) = budget, per row; inf where every key of positive size is taken."""
    c = budget / size.sum(-1, keepdim=True)
    shape, size = c.shape, size.reshape(c.numel(), size.shape[-1])
    c, budget = c.flatten(), budget.expand(shape).flatten()
    certain = torch.zeros_like(c)  # how many keys were taken for certain when c was computed
    moving = torch.arange(len(c), device=c.device)
    while True:
        taken = c[moving, None] * size >= 1
        count = taken.sum(-1, dtype=c.dtype)
        more = count > certain[moving]
        if not more.any():
            return c.reshape(shape)
        # The rows that are done, most of them soon, are not looked at again.
        moving, size, taken, count = moving[more], size[more], taken[more], count[more]
        rest = size.masked_fill(taken, 0).sum(-1)
        # c only grows: certain keys may use the whole budget up while others of tiny size are left, which stay unlikely.
        c[moving] = torch.where(rest > 0, (budget[moving] - count) / rest, torch.inf).maximum(c[moving])
        certain[moving] = count


def _systematic_importance(size, budget, always, seed, layer):
    """1 / inclusion probability of one systematic sample without replacement, probability proportional to size.

    always: bool, as size: keys that are taken for certain beside the budget; or None.
    """
    row, query = _counter(size)
    if always is not None:
        size = size.masked_fill(always, 0)
    c = inclusion_scale(size, budget)
    f = (c * size).mul_(T).clamp_(max=T - 1).floor_().add_(1).masked_fill_(~(size > 0), 0)
    if always is not None:
        f = f.masked_fill_(always, T)
    F = f.int().cumsum(-1, dtype=torch.int32)  # neighbours differ by T at most: what wraps at 2^32 keeps them apart
    u = philox4x32(seed, layer, row, query, torch.tensor(0, device=size.device))[..., :1] >> 8
    strata = F.add_((T - 1 - u).int()) >> 24
    chosen = torch.cat([strata[..., :1] != 0, strata[..., 1:] != strata[..., :-1]], -1)
    return (T / f).masked_fill_(~chosen, 0)


def _share_budget(p, samples, n_allowed):
    """Samples per row of `adaptive`: in proportion to sqrt(exp(entropy)), between 1 and the number of allowed keys."""
    entropy = -torch.special.xlogy(p, p).sum(-1, keepdim=True)
    want = (samples * (entropy / 2).exp()).double()
    n = n_allowed.double()
    target = torch.minimum(samples.double(), n).sum((1, 2), keepdim=True)

    def shares(c):
        return torch.minimum(n, (c * want).clamp(min=1))

    low, high = torch.zeros_like(target), n.amax((1, 2), keepdim=True).clamp(min=1)
    for _ in range(60):
        middle = (low + high) / 2
        enough = shares(middle).sum((1, 2), keepdim=True) >= target
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return shares(high).to(p.dtype)
