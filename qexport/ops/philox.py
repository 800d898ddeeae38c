"""Philox4x32-10, the counter-based generator of every random draw (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011). The same bits as cpp/include/qexport/philox.h."""

import torch

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
ROUNDS = 10


def _mul_hi_lo(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b; the 64-bit product is put together from halves that fit a signed int64."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high << 16) | (low & 0xFFFF)) & _MASK


def philox4x32(seed: int, layer: int, row: torch.Tensor, query: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Random words as a pure function of the seed and the place.

    Args:
        seed: int64; its low and high 32 bits are the key.
        layer: number of the site in its model.
        row, query, block: int64 tensors that broadcast together: b * q_heads + h, query index, block of draws.

    Returns:
        int64 tensor of the broadcast shape plus (4,): four uniform 32-bit words.
    """
    key = [seed & _MASK, (seed >> 32) & _MASK]
    row, query, block = torch.broadcast_tensors(row, query, block)
    c = [torch.full_like(row, layer & _MASK), row & _MASK, query & _MASK, block & _MASK]
    for _ in range(ROUNDS):
        hi0, lo0 = _mul_hi_lo(c[0], _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c[2], _MULTIPLIERS[1])
        c = [hi1 ^ c[1] ^ key[0], lo1, hi0 ^ c[3] ^ key[1], lo0]
        key = [(k + w) & _MASK for k, w in zip(key, _WEYL, strict=True)]
    return torch.stack(c, dim=-1)
