"""Weights as matrix product operators: few numbers where a weight has structure between scales, which trained ones seldom
have."""

from dataclasses import dataclass

import numpy as np

from qexport.mps.layout import Layout, make_layout
from qexport.ops.kernels import kernels

BOND_DIMS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Train:
    """W (rows, columns) as the cores of a train with interleaved sites, behind each other, in float16."""

    cores: np.ndarray
    layout: Layout
    bonds: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return self.cores.nbytes

    @property
    def attributes(self) -> dict:
        """Attributes of MPOLinear."""
        layout = self.layout
        return {
            "rows": layout.rows,
            "cols": layout.cols,
            "row_factors": layout.row_factors,
            "col_factors": layout.col_factors,
            "bonds": self.bonds,
        }

    def dense(self) -> np.ndarray:
        """The float32 matrix that the cores stand for."""
        return kernels().mps_decode(self.cores.astype(np.float32), **self.attributes)


def encode(W: np.ndarray, bond_dim: int) -> Train:
    """The train with the least error that TT-SVD finds; needs the kernels.

    Args:
        W: (rows, columns), finite.
        bond_dim: largest bond dimension, >= 1.
    """
    layout = make_layout("interleaved", *W.shape)
    factors = {"row_factors": layout.row_factors, "col_factors": layout.col_factors}
    cores, *_ = kernels().mps_encode(np.ascontiguousarray(W, np.float32), **factors, bond_dim=bond_dim, tol=0.0)
    limit = np.finfo(np.float16).max
    return Train(np.clip(cores, -limit, limit).astype(np.float16), layout, layout.bonds(bond_dim))


def numbers(rows: int, columns: int, bond_dim: int) -> int:
    """How many numbers a train has."""
    layout = make_layout("interleaved", rows, columns)
    return layout.numbers(layout.bonds(bond_dim))
