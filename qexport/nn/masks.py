"""The masks of nn.MultiheadAttention, checked and as the one that QuantumAttention takes."""

import torch
from torch import nn


def check_masks(attn_mask, key_padding_mask, batch, num_heads, q_len, kv_len):
    """Raise what nn.MultiheadAttention raises for masks of a wrong type or shape.

    Raises:
        AssertionError: neither bool nor floating, or a key_padding_mask of another shape.
        RuntimeError: an attn_mask of another shape.
    """
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
    if attn_mask is not None:
        wanted = (q_len, kv_len) if attn_mask.dim() == 2 else (batch * num_heads, q_len, kv_len)
        if tuple(attn_mask.shape) != wanted:
            raise RuntimeError(
                f"The shape of the {attn_mask.dim()}D attn_mask is {tuple(attn_mask.shape)}, but should be {wanted}."
            )
    if key_padding_mask is not None and tuple(key_padding_mask.shape) != (batch, kv_len):
        raise AssertionError(
            f"Expected key_padding_mask of shape {(batch, kv_len)}, but got {tuple(key_padding_mask.shape)}"
        )


def merged_mask(attn_mask, key_padding_mask, q, num_heads, added):
    """Both masks as one that the op takes, (batch or 1, heads or 1, q_len or 1, kv_len + added): bool with true = attend if
    neither is a float mask, else floats that are added to the scores."""
    batch = q.shape[0]
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, num_heads)))
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        merged = ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
        return nn.functional.pad(merged, (0, added), value=True) if added else merged
    merged = sum(_as_bias(mask, q.dtype) for mask in masks)
    return nn.functional.pad(merged, (0, added)) if added else merged


def _as_bias(mask, dtype):
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask.to(dtype)
