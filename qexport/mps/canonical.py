"""Canonical forms of a train, and what they give: norm, entanglement entropy, samples."""

import math
from dataclasses import replace

import torch

from qexport.arguments import as_seed, whole
from qexport.errors import UsageError
from qexport.mps.train import MatrixProduct
from qexport.ops.philox import philox4x32


def canonical(train: MatrixProduct, center: int) -> MatrixProduct:
    """The same matrix with orthonormal cores on both sides of one site: to its left sum_{a,i,j} A[a,i,j,b] A[a,i,j,b'] is
    the identity, to its right sum_{i,j,b} A[a,i,j,b] A[a',i,j,b] is; the core between has the norm of the matrix.
    (Schollwoeck, Annals of Physics 326, 2011, section 4.4.)

    Args:
        train: real cores; a site whose bonds are larger than what lies beyond them has them shortened.
        center: the site, from 0.

    Raises:
        UsageError: no such site.
    """
    cores = list(train.cores)
    if not 0 <= center < len(cores):
        raise UsageError(f"center must be in 0 to {len(cores) - 1}, got {center}")
    for k in range(center):
        shape = cores[k].shape
        Q, triangle = torch.linalg.qr(cores[k].flatten(-4, -2))
        cores[k] = Q.unflatten(-2, shape[-4:-1])
        cores[k + 1] = torch.einsum("...ab,...brcd->...arcd", triangle, cores[k + 1])
    for k in range(len(cores) - 1, center, -1):
        shape = cores[k].shape
        Q, triangle = torch.linalg.qr(cores[k].flatten(-3).mT)
        cores[k] = Q.mT.unflatten(-1, shape[-3:])
        cores[k - 1] = torch.einsum("...arcb,...db->...arcd", cores[k - 1], triangle)
    bonds = torch.tensor([*(core.shape[-4] for core in cores), 1], device=train.ranks.device)
    return replace(train, cores=tuple(cores), ranks=torch.minimum(train.ranks, bonds))


def entanglement_entropy(train: MatrixProduct) -> torch.Tensor:
    """Von Neumann entropy, in bits, across each of the sites - 1 bonds of the normalised state: float64 (..., sites - 1).

        S_k = -sum_i p_i log2 p_i,   p_i = sigma_i^2 / sum sigma^2,   sigma the Schmidt values at bond k

    At most log2 of the bond dimension; 0 for a matrix of zeros.
    """
    cores = [core.double() for core in canonical(train, 0).cores]
    entropies = []
    for k in range(len(cores) - 1):
        _, sigma, Vh = torch.linalg.svd(cores[k].flatten(-4, -2), full_matrices=False)
        p = sigma.square()
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        entropies.append(torch.special.entr(p).sum(-1) / math.log(2))
        cores[k + 1] = torch.einsum("...a,...ab,...brcd->...arcd", sigma, Vh, cores[k + 1])
    if not entropies:
        return train.error.new_zeros(*train.error.shape, 0)
    return torch.stack(entropies, -1)


def sample(train: MatrixProduct, shots: int, seed: int = 0) -> torch.Tensor:
    """Independent measurements of the state that the entries of a matrix are the amplitudes of: (i, j) with probability
    M_ij^2 / |M|^2, one site after the other, without making the matrix. (Ferris and Vidal, Phys. Rev. B 85, 2012.)

    To sample from probabilities, encode their square roots. Rows and columns of the padding are found as often as the error
    of the train has put weight there.

    Args:
        train: of one matrix, no batch.
        shots: measurements.
        seed: int64; draw s at site k is word s mod 4 of the Philox block (0, 0, k, s / 4).

    Returns:
        int64 (shots, 2): row and column.

    Raises:
        UsageError: a batch, shots below 1, or a matrix of zeros.
    """
    if train.cores[0].ndim != 4:
        raise UsageError(
            f"sample takes one matrix, got a batch of shape {tuple(train.error.shape)}; take its cores one by one"
        )
    whole("shots", shots), as_seed(seed)
    cores = [core.double() for core in canonical(train, 0).cores]
    if not cores[0].square().sum() > 0:
        raise UsageError("a matrix of zeros has no state to measure")
    device = cores[0].device
    row = col = torch.zeros(shots, dtype=torch.int64, device=device)
    state = torch.ones(shots, 1, dtype=torch.float64, device=device)
    for k, core in enumerate(cores):
        _, r, c, right = core.shape
        amplitudes = torch.einsum("sa,arcb->srcb", state, core).reshape(shots, r * c, right)
        cumulative = amplitudes.square().sum(-1).cumsum(-1)
        words = philox4x32(seed, 0, torch.tensor(0), torch.tensor(k), torch.arange((shots + 3) // 4)).flatten()[:shots]
        target = (words.double().to(device) + 0.5) / 2**32 * cumulative[:, -1]
        found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=r * c - 1)
        state = amplitudes[torch.arange(shots, device=device), found]
        state = state / torch.linalg.vector_norm(state, dim=-1, keepdim=True)
        row, col = row * r + found // c, col * c + found % c
    return torch.stack([row, col], -1)
