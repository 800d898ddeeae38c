"""The state `key_summary` of decoding with strategy tree: its shape, and its reference in torch (docs/math.md).

A static cache of keys is summarised in chunks of 512 keys behind the first 16, each as soon as all of its keys are there. A
chunk is cut into 32 clusters of 16 keys. The floats of a head, (chunks, floats) taken as one row, hold one kind after the
other, each for the clusters of all chunks: the mean keys; the mean values; the number of keys, 16, or 0 in the first cluster
of a chunk that is not summarised; mean |k - mean k|^2; mean |v - mean v|^2; mean |v|^2; the places of the keys in the chunk.
`fields` tells them apart.
"""

import itertools
import math

SINK_KEYS = 16  # the first keys, which many heads look at all the time, are always read
CHUNK_KEYS = 512
CLUSTER_KEYS = 16
CHUNK_CLUSTERS = CHUNK_KEYS // CLUSTER_KEYS
RESIDUAL_CLUSTERS, COHERENCE, DECODE_DRAW = 16, 0.09, 3
MARGIN, HOPELESS, MOST_TRIED = 0.8, 2, 4
KEYS_FOR_TOLERANCE, FREE_TOLERANCE = 4000, 0.1


def chunks(length: int) -> int:
    """Whole chunks among `length` keys."""
    return max(0, (length - SINK_KEYS) // CHUNK_KEYS)


def key_summary_shape(batch: int, kv_heads: int, length: int, head_size: int, v_head_size: int) -> tuple[int, int, int, int]:
    """Shape of the float32 tensor key_summary for caches of `length` keys; a new cache has it full of zeros."""
    return batch, kv_heads, chunks(length), CHUNK_CLUSTERS * (head_size + v_head_size + 4 + CLUSTER_KEYS)


def fields(summary, head_size: int, v_head_size: int) -> dict:
    """Views of the parts of key_summary (..., chunks, floats), a contiguous numpy array or tensor, by name: each
    (..., chunks, 32) or (..., chunks, 32, size)."""
    sizes = {
        "mean_key": (head_size,),
        "mean_value": (v_head_size,),
        "keys": (),
        "key_spread": (),
        "value_spread": (),
        "value_norm": (),
        "members": (CLUSTER_KEYS,),
    }
    *front, count, floats = summary.shape
    heads = summary.reshape(*front, count * floats)
    parts, at = {}, 0
    for name, size in sizes.items():
        width = count * CHUNK_CLUSTERS * (size[0] if size else 1)
        parts[name] = heads[..., at : at + width].reshape(*front, count, CHUNK_CLUSTERS, *size)
        at += width
    return parts


def update(key_summary, K, V, nonpad, q_len: int):
    """present_key_summary: chunks that the last q_len tokens filled, or that were never summarised, are made anew; one that
    is not full is marked as such."""
    present = key_summary.clone()
    for b in range(K.shape[0]):
        length = min(max(int(nonpad[b]), 0), K.shape[2])
        for h in range(K.shape[1]):
            parts = fields(present[b, h], K.shape[-1], V.shape[-1])
            for c in range(present.shape[2]):
                end = SINK_KEYS + (c + 1) * CHUNK_KEYS
                if end > length:
                    parts["keys"][c, 0] = 0
                elif end > length - q_len or parts["keys"][c, 0] != CLUSTER_KEYS:
                    chunk = slice(end - CHUNK_KEYS, end)
                    for name, value in _summarised(K[b, h, chunk].double(), V[b, h, chunk].double()).items():
                        parts[name][c] = value.to(present.dtype)
    return present


def _summarised(K, V) -> dict:
    """The parts of one chunk."""
    import torch

    members = _clusters(K, torch.arange(CHUNK_KEYS)).reshape(CHUNK_CLUSTERS, CLUSTER_KEYS)
    k, v = K[members], V[members]
    mean_k, mean_v = k.mean(1), v.mean(1)
    return {
        "mean_key": mean_k,
        "mean_value": mean_v,
        "keys": torch.full((CHUNK_CLUSTERS,), float(CLUSTER_KEYS)),
        "key_spread": (k - mean_k[:, None]).square().sum(2).mean(1),
        "value_spread": (v - mean_v[:, None]).square().sum(2).mean(1),
        "value_norm": v.square().sum(2).mean(1),
        "members": members,
    }


def _clusters(K, members):
    """`members` in an order in which every 16 are a cluster: halved along the principal direction until 16 are left."""
    import torch

    if len(members) <= CLUSTER_KEYS:
        return members
    centred = K[members] - K[members].mean(0)
    direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    order = torch.argsort(centred @ direction, stable=True)
    half = len(members) // 2
    return torch.cat([_clusters(K, members[order[:half]]), _clusters(K, members[order[half:]])])


def pays(keys: int, tolerance: float) -> bool:
    """Whether a step over `keys` keys tries to read fewer of them within `tolerance`; else it reads all at once."""
    return not tolerance or keys >= paying_length(tolerance)


def paying_length(tolerance: float) -> int:
    """The fewest keys of which a step tries to read fewer within `tolerance`."""
    return math.ceil(KEYS_FOR_TOLERANCE / min(tolerance / FREE_TOLERANCE, 1) ** 2)


def decode_step(q, K, V, bounds, first: int, end: int, summary, samples, a, seed: int, place: int, position: int):
    """The query heads of one kv head, in one step of a few queries.

    Args:
        q: (group, q_len, head_size), scaled. K, V: (n, head_size), (n, v_head_size). bounds: [(lo, hi)] of each query, the
            keys that it sees. first, end: the summarised chunks that all of them see. summary: (chunks, floats).
        samples: num_samples of each head. a: attributes of the op.
        place: number b * q_heads + h of the first head. position: of the first query.

    Returns:
        (group, q_len, v_head_size) and (group,): output and relative error as estimated; None where all keys are read.
    """
    import torch

    from qexport.ops.philox import philox4x32

    clusters, tolerance = (end - first) * CHUNK_CLUSTERS, a["error_tolerance"]
    budgets = [max(-(-s // CLUSTER_KEYS), RESIDUAL_CLUSTERS if tolerance else 0) for s in samples]
    budgets = [clusters if b + RESIDUAL_CLUSTERS >= clusters else b for b in budgets]
    if min(budgets) == clusters or (tolerance and MOST_TRIED * max(budgets) > clusters):
        return None
    Y, errors = q.new_zeros(*q.shape[:2], V.shape[-1]), torch.zeros(len(q))
    for h, budget in enumerate(budgets):
        for attempt in itertools.count():
            square = torch.tensor(0.0, dtype=q.dtype)
            for i, (lo, hi) in enumerate(bounds):
                counter = (torch.tensor(x) for x in (place + h, position + i, DECODE_DRAW + attempt))
                word = int(philox4x32(seed, a["layer"], *counter)[0])
                row = q[h, i], K, V, lo, hi, first, end, summary
                Y[h, i], more = decode(*row, budget << attempt, a["softcap"], a["residual"], word)
                square += more
            errors[h] = torch.sqrt(square / Y[h].square().sum()) if square > 0 else 0.0
            if not tolerance or errors[h] <= MARGIN * tolerance:
                break
            if errors[h] > HOPELESS * MARGIN * tolerance or MOST_TRIED * (budget << attempt + 1) > clusters:
                return None
    return Y, errors


def decode(q, K, V, lo: int, hi: int, first: int, end: int, summary, budget: int, softcap: float, residual: str, word: int):
    """One query over the keys [lo, hi) of one head, of which the chunks [first, end) are summarised.

    Args:
        q: (head_size,), scaled. K, V: (n, head_size), (n, v_head_size). summary: (chunks, floats).
        budget: clusters that are read. word: 32 random bits.

    Returns:
        (v_head_size,) the output, and its squared error as estimated.
    """
    import torch

    from qexport.ops.quantum_attention_tree_ref import systematic_sample

    def capped(s):
        return softcap * torch.tanh(s / softcap) if softcap else s

    f = {name: x[first:end].to(q.dtype).flatten(0, 1) for name, x in fields(summary, K.shape[-1], V.shape[-1]).items()}
    square = q.square().sum() / len(q)
    log_weight = capped(f["mean_key"] @ q) + square / 2 * f["key_spread"]
    spread = torch.expm1((square * f["key_spread"]).clamp(max=20))
    size = torch.exp(log_weight - log_weight.max()) * torch.sqrt(f["value_spread"] + f["value_norm"] * spread)
    chosen = torch.zeros(len(size), dtype=torch.bool)
    chosen[torch.argsort(size, descending=True, stable=True)[:budget]] = True
    offset = SINK_KEYS + CHUNK_KEYS * torch.arange(first, end).repeat_interleave(CHUNK_CLUSTERS)
    members = f["members"].long() + offset[:, None]
    key = torch.arange(len(K))
    inside = (key >= SINK_KEYS + first * CHUNK_KEYS) & (key < SINK_KEYS + end * CHUNK_KEYS)
    exact = torch.cat([key[(key >= lo) & (key < hi) & ~inside], members[chosen].flatten()])
    logits = torch.cat([capped(K[exact] @ q), log_weight[~chosen] + math.log(CLUSTER_KEYS)])
    top = logits.max()
    weights = torch.exp(logits - top)
    y = weights @ torch.cat([V[exact], f["mean_value"][~chosen]]) / weights.sum()
    if chosen.all():
        return y, 0.0
    x = torch.where(chosen, 0, size + size[~chosen].mean() / 4)
    drawn = []
    for c, factor in systematic_sample(x, RESIDUAL_CLUSTERS, word):
        e, w = torch.exp(capped(K[members[c]] @ q) - top), CLUSTER_KEYS * torch.exp(log_weight[c] - top)
        drawn.append((factor, e @ V[members[c]] - w * f["mean_value"][c], e.sum() - w))
    known = weights.sum() + sum(max(more, 0) for _, _, more in drawn)
    z = [factor * (wrong - more * y) / known for factor, wrong, more in drawn] or [torch.zeros_like(y)]
    total, squares, length, n = sum(z), sum(d.square().sum() for d in z), sum(d.norm() for d in z), max(len(z), 2)
    whole = total.square().sum()
    variance = (squares - whole / n).clamp(min=0) * n / (n - 1)
    surplus = (whole - variance).clamp(min=0)
    error = torch.maximum(surplus, COHERENCE * length**2)
    shrink = {"unbiased": 1.0, "james_stein": surplus / whole if surplus > 0 else 0.0}.get(residual, 0.0)
    return y + shrink * total, (1 - shrink) ** 2 * error + shrink**2 * variance
