"""A matrix as a train of cores, and products without the matrix: torch, any device, any float type."""

import itertools
import math
from dataclasses import dataclass

import torch

from qexport.errors import UsageError
from qexport.mps.layout import Layout, check_bonds


@dataclass(frozen=True)
class MatrixProduct:
    """A (batch of) matrix as a matrix product operator; where no site has both a row and a column index, also a matrix
    product state of its entries.

        M[i, j] = core_1[0, i_1, j_1, :] core_2[:, i_2, j_2, :] .. core_L[:, i_L, j_L, 0]

    Attributes:
        cores: core k is (..., left bond, row_factors[k], col_factors[k], right bond).
        layout: the sites.
        ranks: int64 (..., sites + 1), the bond dimensions that each matrix uses; the cores hold zeros beyond.
        error: float64 (...), Frobenius norm of the error over that of the matrix; 0 for a matrix of zeros.
        lower_bound: float64 (...), what no train of these ranks can be better than, likewise relative.
    """

    cores: tuple[torch.Tensor, ...]
    layout: Layout
    ranks: torch.Tensor
    error: torch.Tensor
    lower_bound: torch.Tensor

    @property
    def bonds(self) -> tuple[int, ...]:
        """Bond dimensions of the cores, from 1 to 1."""
        return (*(core.shape[-4] for core in self.cores), self.cores[-1].shape[-1])

    @property
    def bytes_per_matrix(self) -> int:
        """Bytes of the cores of one matrix."""
        return sum(core[..., :, :, :, :].numel() // max(1, self.error.numel()) * core.element_size() for core in self.cores)

    def packed(self) -> torch.Tensor:
        """All cores of a matrix behind each other, (..., numbers): the form that the ops take."""
        return torch.cat([core.flatten(-4) for core in self.cores], -1)


def unpack(cores: torch.Tensor, layout: Layout, bonds: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """The cores of a train from one tensor (..., numbers) that holds them behind each other.

    Raises:
        UsageError: bonds that are no chain from 1 to 1 over the sites, or another number of numbers.
    """
    check_bonds(layout, bonds)
    shapes, numbers = layout.shapes(bonds), layout.numbers(bonds)
    if cores.ndim < 1 or cores.shape[-1] != numbers:
        raise UsageError(f"cores must hold {numbers} numbers on the last axis, got shape {tuple(cores.shape)}")
    parts = cores.split([math.prod(shape) for shape in shapes], -1)
    return tuple(part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True))


def merge(
    cores: tuple[torch.Tensor, ...], layout: Layout, groups: tuple[int, ...]
) -> tuple[tuple[torch.Tensor, ...], Layout]:
    """The same matrix as a train of fewer sites: groups[i] consecutive ones become one.

    Raises:
        UsageError: the groups do not sum to the number of sites.
    """
    if sum(groups) != len(cores) or min(groups) < 1:
        raise UsageError(f"groups must be >= 1 and sum to {len(cores)} sites, got {list(groups)}")
    merged, rest = [], iter(cores)
    for count in groups:
        state = next(rest)  # (..., bond, R, C, bond)
        for core in itertools.islice(rest, count - 1):
            state = torch.einsum("...lRCa,...arcb->...lRrCcb", state, core)
            state = state.flatten(-5, -4).flatten(-3, -2)
        merged.append(state)
    factors = [tuple(core.shape[axis] for core in merged) for axis in (-3, -2)]
    return tuple(merged), Layout(layout.rows, layout.cols, *factors)


def decode(cores: tuple[torch.Tensor, ...], layout: Layout) -> torch.Tensor:
    """The matrix (..., rows, cols) of a train. Needs about n^2 (bond_1 + ..) multiply-adds for the last few sites."""
    (matrix,), _ = merge(cores, layout, (len(cores),))
    return matrix[..., 0, : layout.rows, : layout.cols, 0]


def apply(cores: tuple[torch.Tensor, ...], layout: Layout, V: torch.Tensor) -> torch.Tensor:
    """M V for a train M and V (..., cols, features) without making M: about 2 n bond^2 multiply-adds per site and feature.

    Raises:
        UsageError: V does not have `cols` rows.
    """
    if V.ndim < 2 or V.shape[-2] != layout.cols:
        raise UsageError(f"V must be (..., {layout.cols}, features), got {tuple(V.shape)}")
    state = torch.nn.functional.pad(V, (0, 0, 0, layout.padded[1] - layout.cols)).unsqueeze(-2)
    # From the last site on: state is (..., columns to the left, bond, rows to the right x features).
    for core in reversed(cores):
        left, r, c = core.shape[-4:-1]
        state = state.unflatten(-3, (-1, c)).flatten(-3, -2)
        state = core.flatten(-4, -3).flatten(-2).unsqueeze(-3) @ state
        state = state.unflatten(-2, (left, r)).flatten(-2)
    return state[..., 0, 0, :].unflatten(-1, (layout.padded[0], V.shape[-1]))[..., : layout.rows, :]
