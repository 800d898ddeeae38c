"""The torch reference of QuantumAttention: the formulas of docs/math.md, written to be read and checked, not to be fast."""

import torch

from qexport.errors import UsageError
from qexport.ops import key_summary as key_summaries
from qexport.ops.draws_ref import combine, draw
from qexport.ops.philox import philox4x32
from qexport.ops.quantum_attention import SPEC
from qexport.ops.quantum_attention_tree_ref import CPU, kept_keys, tree_attention_ref
from qexport.ops.strategies import BLOCKWISE


def quantum_attention_ref(
    Q,
    K,
    V,
    attn_mask=None,
    past_key=None,
    past_value=None,
    nonpad_kv_seqlen=None,
    seed=0,
    key_summary=None,
    *,
    dtype=torch.float64,
    dropout_p=0.0,
    blocks=CPU,
    **attributes,
):
    """Attention by sampling, in torch.

    Args:
        Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen: tensors of the shapes that the op table gives.
        seed: int of 64 bits.
        key_summary: float32 tensor of `key_summary_shape`; with it, strategy tree decodes from the summary.
        dtype: what is computed in; the outputs are rounded to Q's type.
        dropout_p: share of the probabilities that is dropped, by torch's generator at this seed and layer; Y alone feels it.
            Strategy tree, whose clusters have no single probabilities to drop, is then exact.
        blocks: of strategy tree, as the device has them.
        attributes: those of the op table, with its defaults.

    Returns:
        (Y, present_key, present_value, qk_matmul_output, error_estimate, present_key_summary) in the shapes of the op table;
        error_estimate is None for the strategies that have none, present_key_summary where there is no key_summary.

    Raises:
        UsageError: an attribute outside its limits, 3-D inputs without head counts.
    """
    a = SPEC.resolve(attributes)
    out_dtype, three_d = Q.dtype, Q.ndim == 3
    if three_d:
        Q, K, V = (_split_heads(t, a[n]) for t, n in ((Q, "q_num_heads"), (K, "kv_num_heads"), (V, "kv_num_heads")))
    if past_key is not None:
        K, V = torch.cat([past_key, K], 2), torch.cat([past_value, V], 2)
    present = K, V
    scale = Q.shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
    group = Q.shape[1] // K.shape[1]
    Q, K, V = Q.to(dtype), K.to(dtype), V.to(dtype)
    heads = K, V
    if group > 1:
        K, V = K.repeat_interleave(group, 1), V.repeat_interleave(group, 1)

    raw = scale * (Q @ K.transpose(-1, -2))
    capped = a["softcap"] * torch.tanh(raw / a["softcap"]) if a["softcap"] else raw
    past_len = 0 if past_key is None else past_key.shape[2]
    allowed = _allowed(a, raw.shape[0], *raw.shape[2:], past_len, nonpad_kv_seqlen, raw.device)
    scores = capped
    if attn_mask is not None:
        short = raw.shape[-1] - attn_mask.shape[-1]
        if attn_mask.dtype == torch.bool:
            allowed = allowed & torch.nn.functional.pad(attn_mask, (0, short), value=False)
        else:
            bias = torch.nn.functional.pad(attn_mask.to(dtype), (0, short), value=-torch.inf)
            allowed = allowed & (bias > -torch.inf)
            scores = capped + bias
    if not allowed.all():
        scores = scores.masked_fill(~allowed, -torch.inf)
    p = torch.softmax(scores, -1)
    lost = p[..., :1].isnan()
    if lost.any():
        p = p.masked_fill(lost, 0)  # a row with no allowed key has no probability anywhere

    error = torch.zeros(Q.shape[:2], dtype=torch.float32, device=Q.device) if a["strategy"] in BLOCKWISE else None
    kept = None
    if a["strategy"] == "tree" and not dropout_p:
        kept = kept_keys(attn_mask, a, Q.shape[0], Q.shape[2], raw.shape[-1])
    if kept is None:
        Y = _estimate(p, V, allowed, nonpad_kv_seqlen, seed, a, dropout_p)
    else:
        offset = torch.full((Q.shape[0],), past_len) if nonpad_kv_seqlen is None else nonpad_kv_seqlen - Q.shape[2]
        if nonpad_kv_seqlen is not None:
            kept = kept & (torch.arange(raw.shape[-1]) < nonpad_kv_seqlen[:, None])
        Y, error = tree_attention_ref(scale * Q, *heads, kept, offset, a, seed, blocks)
    summary = None
    if key_summary is not None:
        summary = key_summaries.update(key_summary, *present, nonpad_kv_seqlen, Q.shape[2])
        longest = min(int(nonpad_kv_seqlen.max()), raw.shape[-1])
        if attn_mask is None and kept is None and key_summaries.pays(longest, a["error_tolerance"]):
            _decode(Y, error, scale * Q, K, V, allowed, summary, a, seed, nonpad_kv_seqlen - Q.shape[2])
    if three_d:
        Y = Y.transpose(1, 2).flatten(2)
    qk = (raw, capped, scores, p)[a["qk_matmul_output_mode"]]
    return Y.to(out_dtype), *present, qk.to(out_dtype), error, summary


def _decode(Y, errors, Q, K, V, allowed, summary, a, seed, positions):
    """Fills Y and errors with what strategy tree makes of a key_summary that is up to date; chunks count where all rows see
    them."""
    group = Q.shape[1] // summary.shape[1]
    for b in range(Q.shape[0]):
        rows = allowed[b, 0] if allowed.shape[0] > 1 else allowed[0, 0]
        keys = [torch.nonzero(row).flatten() for row in rows]
        if any(len(k) == 0 for k in keys):
            continue
        bounds = [(int(k[0]), int(k[-1]) + 1) for k in keys]
        low, high = max(lo for lo, _ in bounds), min(hi for _, hi in bounds)
        first = max(0, -((key_summaries.SINK_KEYS - low) // key_summaries.CHUNK_KEYS))
        end = min(summary.shape[2], key_summaries.chunks(high))
        for h in range(0, Q.shape[1] if end > first else 0, group):
            heads = slice(h, h + group)
            samples = [a["num_samples"][i % len(a["num_samples"])] for i in range(h, h + group)]
            state = first, end, summary[b, h // group], samples
            place = b * Q.shape[1] + h, int(positions[b])
            found = key_summaries.decode_step(Q[b, heads], K[b, h], V[b, h], bounds, *state, a, seed, *place)
            if found:
                Y[b, heads], errors[b, heads] = found


def _split_heads(t, heads):
    if heads is None:
        raise UsageError("[QuantumAttention] 3-D inputs need q_num_heads and kv_num_heads")
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def _allowed(a, batch, q_len, total_len, past_len, nonpad, device):
    """The keys that the causal frontier, the windows and the padding leave: bool (batch, 1, q_len, total_len)."""
    if nonpad is not None and past_len == 0:
        offset = nonpad.reshape(-1, 1, 1, 1) - q_len
    else:
        offset = torch.full((batch, 1, 1, 1), past_len, device=device)
    key = torch.arange(total_len, device=offset.device)
    distance = (
        torch.arange(q_len, device=offset.device)[:, None] + offset - key
    )  # how far the key lies to the left of the query
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if a["is_causal"]:
        allowed &= distance >= 0
    if a["left_window_size"] >= 0:
        allowed &= distance <= a["left_window_size"]
    if a["right_window_size"] >= 0:
        allowed &= -distance <= a["right_window_size"]
    if nonpad is not None:
        allowed &= key < nonpad.reshape(-1, 1, 1, 1)
    return allowed


def _estimate(p, V, allowed, nonpad, seed, a, dropout_p=0.0):
    """Y from the probabilities p (batch, heads, q_len, keys) and V (batch, heads, keys, v_head_size)."""
    kept = None
    if dropout_p:
        # Heads of other settings are other layers (qexport.nn), and must not drop alike; at a place where nothing is drawn.
        word = philox4x32(seed, a["layer"], *torch.full((3,), -1))[0]
        generator = torch.Generator(p.device).manual_seed(int(word))
        kept = (torch.rand(p.shape, generator=generator, device=p.device) >= dropout_p) / ((1 - dropout_p) or 1.0)
    if a["strategy"] in BLOCKWISE or p.numel() == 0:
        return (p if kept is None else p * kept) @ V
    valid = torch.full((p.shape[0],), p.shape[-1], device=p.device) if nonpad is None else nonpad
    V = torch.where((torch.arange(p.shape[-1], device=p.device) < valid[:, None])[:, None, :, None], V, 0)
    return combine(p, V, draw(p, V, allowed, valid, seed, a), kept)
