"""From a matrix to a train by sequential singular value decompositions in float64 (TT-SVD; Oseledets, SIAM J. Sci. Comput.
33, 2011). Cores left of the last cut are orthonormal, so that the square of the error is the sum of the squares of all
singular values that were discarded, exactly."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from qexport.errors import UsageError
from qexport.mps.layout import KINDS, Layout, check_bonds, make_layout
from qexport.mps.train import MatrixProduct

Decompose = Callable[[torch.Tensor, Layout, tuple[int, ...], float], MatrixProduct]

# Singular values up to this share of the largest one are what rounding the entries to float32 leaves (an ulp): not kept.
NOISE = 2.0**-24
# Sums of squares that float64 holds, with those of what is much smaller than the norm.
LEAST_NORM2, MOST_NORM2 = 1e-280, 1e300


def tt_svd(matrix, layout: Layout, bonds: tuple[int, ...], tol: float = 0.0) -> MatrixProduct:
    """The train of a matrix with bond dimensions up to `bonds`.

    Each cut keeps the largest singular values of what the cuts before have left. With tol = 0 sites at the ends whose bond
    is complete hold the identity and need no decomposition. With tol > 0 every cut discards as many of the smallest ones as
    an equal share of tol^2 |M|^2 allows, what one cut does not use passing on to the next.

    Args:
        matrix: (..., rows, cols), floating point.
        layout: the sites.
        bonds: sites + 1 upper limits, 1 at both ends (`Layout.bonds`).
        tol: largest relative error, in [0, 1); `bonds` hold even where they cost more than that.

    Returns:
        Cores in float64, padded with zeros to the largest rank in the batch.

    Raises:
        UsageError: shapes, bonds or tol outside their limits, a number that is not finite, a norm whose square float64
            does not hold.
    """
    check_bonds(layout, bonds)
    if not 0 <= tol < 1:
        raise UsageError(f"tol must be in [0, 1), got {tol:g}")
    if matrix.ndim < 2 or tuple(matrix.shape[-2:]) != (layout.rows, layout.cols):
        raise UsageError(f"matrix must be (..., {layout.rows}, {layout.cols}), got {tuple(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise UsageError("matrix must be finite, got NaN or infinity")
    batch = matrix.shape[:-2]
    R, C = layout.padded
    state = torch.nn.functional.pad(matrix.double(), (0, C - layout.cols, 0, R - layout.rows)).reshape(-1, 1, R, C)
    norm2 = state.square().sum((-3, -2, -1))
    if bool((((norm2 < LEAST_NORM2) | (norm2 > MOST_NORM2)) & (state != 0).flatten(1).any(1)).any()):
        raise UsageError(
            "the norm of a matrix must be 0 or in 1e-140 to 1e150, whose squares float64 holds: scale the matrix"
        )
    spent, worst = torch.zeros_like(norm2), torch.zeros_like(norm2)
    last, complete = len(bonds) - 2, 1
    cores, ranks = [], [torch.ones(len(state), dtype=torch.int64, device=state.device)]
    eye = partial(torch.eye, dtype=state.dtype, device=state.device)
    for k, (r, c) in enumerate(zip(layout.row_factors, layout.col_factors, strict=True)):
        left, R, C = state.shape[1], R // r, C // c
        unfolded = state.reshape(-1, left, r, R, c, C).permute(0, 1, 2, 4, 3, 5).reshape(len(state), left * r * c, R * C)
        rows, cols = unfolded.shape[1:]
        complete *= r * c
        whole = tol == 0 and bonds[k + 1] >= min(complete, cols)
        if k == last or (whole and cols < rows):
            kept, unitary, rest = torch.full_like(ranks[0], cols), unfolded, eye(cols)
            rest = rest.expand(len(state), cols, cols)
        elif whole and rows == complete:
            kept, unitary, rest = torch.full_like(ranks[0], rows), eye(rows), unfolded
            unitary = unitary.expand(len(state), rows, rows)
        else:
            # Without Q: the left vectors and the singular values are those of the small triangle.
            small = torch.linalg.qr(unfolded.mT, mode="r")[1].mT if cols > rows else unfolded
            U, sigma, _ = torch.linalg.svd(small, full_matrices=False)
            allowed = (tol**2 * norm2 - spent).clamp(min=0) / (last - k)
            kept, lost = _ranks(sigma, bonds[k + 1], allowed)
            spent, worst = spent + lost, torch.maximum(worst, lost)
            most = int(kept.max())
            used = (torch.arange(most, device=kept.device) < kept[:, None]).double()
            unitary = U[..., :most] * used[:, None]
            rest = unitary.mT @ unfolded
        ranks.append(kept)
        cores.append(unitary.reshape(*batch, left, r, c, -1))
        state = rest.reshape(len(state), -1, R, C)
    scale = torch.where(norm2 > 0, norm2, 1)
    error, bound = ((x / scale).sqrt().reshape(batch) for x in (spent, worst))
    return MatrixProduct(tuple(cores), layout, torch.stack(ranks, -1).reshape(*batch, -1), error, bound)


def _ranks(sigma, most: int, allowed) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of the singular values (batch, n), largest first, are kept, and the sum of the squares of the others."""
    # tail[k]: what is lost when k are kept.
    tail = torch.nn.functional.pad(sigma.square().flip(-1).cumsum(-1).flip(-1), (0, 1))
    kept = torch.minimum((tail > allowed[:, None]).sum(-1), (sigma > NOISE * sigma[:, :1]).sum(-1)).clamp(1, most)
    return kept, tail.gather(-1, kept[:, None])[:, 0]


def encode(
    matrix, bond_dim: int = 32, tol: float | None = None, layout: str = "auto", decompose: Decompose = tt_svd
) -> MatrixProduct:
    """The train of a matrix, in the layout that suits it.

    Args:
        matrix: (..., rows, cols), floating point.
        bond_dim: largest bond dimension.
        tol: None: each bond keeps as much as bond_dim allows. Else in (0, 1): the smallest ranks for that relative error.
        layout: `serial`, `interleaved`, or `auto`: the one with the smaller error over the batch; with `tol`, of the layouts
            that keep it the one with fewer numbers.
        decompose: what makes the train of a layout; called as `tt_svd`.

    Returns:
        Cores in the type of `matrix`.

    Raises:
        UsageError: an argument outside its limits, a number that is not finite.
    """
    if tol is not None and not 0 < tol < 1:
        raise UsageError(f"tol must be in (0, 1), got {tol:g}; None is no tolerance")
    if layout not in (*KINDS, "auto"):
        raise UsageError(f"layout must be one of {', '.join(KINDS)}, auto, got {layout!r}")
    if matrix.ndim < 2 or not matrix.is_floating_point():
        raise UsageError(f"matrix must be (..., rows, cols) of floating point, got {tuple(matrix.shape)} of {matrix.dtype}")
    found = []
    for kind in KINDS if layout == "auto" else (layout,):
        sites = make_layout(kind, *matrix.shape[-2:])
        found.append(decompose(matrix, sites, sites.bonds(bond_dim), tol or 0.0))

    def badness(train):
        error = float(train.error.square().mean().sqrt()) if train.error.numel() else 0.0
        kept = tol is not None and error <= tol
        # Below 1e-7 errors are rounding: the smaller train is the better one.
        return (0.0 if kept else max(error, 1e-7), train.bytes_per_matrix)

    best = min(found, key=badness)
    return replace(best, cores=tuple(core.to(matrix.dtype) for core in best.cores))


def error_limits(matrix, layout: Layout, ranks) -> tuple[float, float]:
    """What the best train of these ranks can reach, relative: (the largest loss of any cut by itself, the root of the
    sum of their squares). The first no train can beat, the second TT-SVD never exceeds. One whole SVD per cut: for checks.

    Args:
        matrix: (rows, cols).
        layout: the sites.
        ranks: sites + 1 numbers.
    """
    R, C = layout.padded
    padded = torch.nn.functional.pad(matrix.double(), (0, C - layout.cols, 0, R - layout.rows))
    shape = layout.row_factors + layout.col_factors
    sites = len(layout.row_factors)
    order = [axis for k in range(sites) for axis in (k, sites + k)]
    tensor = padded.reshape(shape).permute(order)
    losses = []
    for k in range(1, sites):
        rows = math.prod(layout.row_factors[:k]) * math.prod(layout.col_factors[:k])
        losses.append(float(torch.linalg.svdvals(tensor.reshape(rows, -1))[int(ranks[k]) :].square().sum()))
    norm2 = float(padded.square().sum()) or 1.0
    return math.sqrt(max(losses, default=0.0) / norm2), math.sqrt(sum(losses) / norm2)
