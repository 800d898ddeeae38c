"""The state `key_summary` of decoding with strategy tree: its shape, and its reference in torch (docs/math.md).

A static cache of keys is summarised in chunks of 512 keys behind the first 16, each as soon as all of its keys are there. A
chunk is cut into 32 clusters of 16 keys. The floats of a head, (chunks, floats) taken as one row, hold one kind after the
other, each for the clusters of all chunks: the mean keys; the mean values; the number of keys, 16, or 0 in the first cluster
of a chunk that is not summarised; mean |k - mean k|^2; mean |v - mean v|^2; mean |v|^2; the places of the keys in the chunk.
`fields` tells them apart.
"""

SINK_KEYS = 16  # the first keys, which many heads look at all the time, are always read
CHUNK_KEYS = 512
CLUSTER_KEYS = 16
CHUNK_CLUSTERS = CHUNK_KEYS // CLUSTER_KEYS


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


def decode(q, K, V, lo: int, hi: int, first: int, end: int, summary, num_samples: int, softcap: float):
    """One query over the keys [lo, hi) of one head, of which the chunks [first, end) are summarised.

    Args:
        q: (head_size,), scaled. K, V: (n, head_size), (n, v_head_size). summary: (chunks, floats).

    Returns:
        (v_head_size,) the output.
    """
    import torch

    def capped(s):
        return softcap * torch.tanh(s / softcap) if softcap else s

    f = {name: x[first:end].to(q.dtype).flatten(0, 1) for name, x in fields(summary, K.shape[-1], V.shape[-1]).items()}
    square = q.square().sum() / len(q)
    log_weight = capped(f["mean_key"] @ q) + square / 2 * f["key_spread"]
    spread = torch.expm1((square * f["key_spread"]).clamp(max=20))
    gain = 2 * log_weight + torch.log(f["value_spread"] + f["value_norm"] * spread)
    budget = -(-num_samples // CLUSTER_KEYS)
    chosen = torch.zeros(len(gain), dtype=torch.bool)
    chosen[torch.argsort(gain, descending=True, stable=True)[:budget]] = True
    offset = SINK_KEYS + CHUNK_KEYS * torch.arange(first, end).repeat_interleave(CHUNK_CLUSTERS)
    members = (f["members"].long() + offset[:, None])[chosen].flatten()
    key = torch.arange(len(K))
    inside = (key >= SINK_KEYS + first * CHUNK_KEYS) & (key < SINK_KEYS + end * CHUNK_KEYS)
    exact = torch.cat([key[(key >= lo) & (key < hi) & ~inside], members])
    logits = torch.cat([capped(K[exact] @ q), log_weight[~chosen] + torch.log(torch.tensor(float(CLUSTER_KEYS)))])
    return torch.softmax(logits, 0) @ torch.cat([V[exact], f["mean_value"][~chosen]])
