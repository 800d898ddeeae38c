"""Inputs of QuantumAttentionSimulator."""

import torch


def qkv(*shape, keys=None, dtype=torch.float64, seed=0):
    """Of shape (..., q_len, d); values of 3 numbers."""
    generator = torch.Generator().manual_seed(seed)
    keys = (*shape[:-2], keys or shape[-2], shape[-1])
    Q, K, V = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, keys, (*keys[:-1], 3)))
    return Q.to(dtype), K.to(dtype), V.to(dtype)


def softmax(Q, K):
    return (Q @ K.mT / Q.shape[-1] ** 0.5).softmax(-1)
