"""The torch reference of QuantumMeasure: the draws of docs/noise.md, the same bits as the kernel's."""

import torch

from qexport.ops.draws_ref import CDF_ONE
from qexport.ops.philox import philox4x32
from qexport.ops.probability_rows import check_rows
from qexport.ops.quantum_measure import SPEC


def quantum_measure_ref(probabilities, seed=0, **attributes):
    """How often each outcome is found in `shots` measurements of rows of probabilities.

    Args:
        probabilities: (..., n) tensor of up to 4 axes; rows sum to one, or are zeros.
        seed: int of 64 bits.
        attributes: those of the op table, with its defaults.

    Returns:
        Frequencies of the shape and type of `probabilities`.

    Raises:
        UsageError: an attribute or a row outside its limits.
    """
    a = SPEC.resolve(attributes)
    check_rows(SPEC.name, probabilities, least=1)
    n, shots = probabilities.shape[-1], a["shots"]
    p = probabilities.reshape(-1, n).double()
    total = p.cumsum(-1)[:, -1:]  # summed in index order, as the kernel does
    f = torch.where(p > 0, (p * (CDF_ONE / total)).floor() + 1, 0).long()
    F = f.cumsum(-1)
    queries = probabilities.shape[-2] if probabilities.ndim > 1 else 1
    place = torch.arange(len(p), device=p.device)[:, None]
    block = torch.arange((shots + 3) // 4, device=p.device)
    words = philox4x32(seed, a["layer"], place // queries, place % queries, block)
    target = words.flatten(1)[:, :shots] * F[:, -1:] >> 32
    outcome = torch.searchsorted(F, target, right=True).clamp(max=n - 1)
    counts = torch.zeros_like(p).scatter_add(-1, outcome, torch.ones_like(target, dtype=p.dtype))
    frequencies = torch.where(total > 0, counts / shots, 0)
    if probabilities.dtype != torch.float64:
        frequencies = frequencies.float()  # then to the type: rounded twice, as the kernel does
    return frequencies.to(probabilities.dtype).reshape(probabilities.shape)
