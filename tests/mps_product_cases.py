"""Cases of MPSAttention and MPOLinear: every form of input, and matrices whose sites pad, are one-sided or are one."""

from dataclasses import dataclass

import numpy as np

from qexport.mps.layout import make_layout


@dataclass(frozen=True)
class Case:
    """A train, and what it multiplies.

    Attributes:
        rows, cols, kind, bond_dim: of the train.
        batch: leading axes, of V or x.
        shared: one train for the whole batch.
        width: features of V.
    """

    name: str
    rows: int
    cols: int
    kind: str
    bond_dim: int
    batch: tuple[int, ...] = ()
    shared: bool = True
    width: int = 5

    def attributes(self) -> dict:
        layout = make_layout(self.kind, self.rows, self.cols)
        bonds = list(layout.bonds(self.bond_dim))
        factors = {"row_factors": list(layout.row_factors), "col_factors": list(layout.col_factors)}
        return {"rows": self.rows, "cols": self.cols, **factors, "bonds": bonds}

    def cores(self, batch=()) -> np.ndarray:
        """Gaussian cores whose matrix has entries of about one."""
        rng = np.random.default_rng(self.rows + 7 * self.cols)
        layout = make_layout(self.kind, self.rows, self.cols)
        shapes = layout.shapes(layout.bonds(self.bond_dim))
        parts = [rng.standard_normal((*batch, int(np.prod(shape)))) / shape[0] ** 0.5 for shape in shapes]
        return np.concatenate(parts, -1)

    def attention(self) -> tuple[np.ndarray, np.ndarray]:
        """cores and V."""
        rng = np.random.default_rng(1)
        V = rng.standard_normal((*self.batch, self.cols, self.width))
        return self.cores(() if self.shared else self.batch), V

    def linear(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, cores and bias."""
        rng = np.random.default_rng(2)
        return rng.standard_normal((*self.batch, self.rows)), self.cores(), rng.standard_normal(self.cols)


CASES = [
    Case("one_entry", 1, 1, "interleaved", 1, width=1),
    Case("column", 7, 1, "interleaved", 2, width=3),
    Case("row", 1, 9, "serial", 3, (2,)),
    Case("square", 64, 64, "interleaved", 4, width=33),
    Case("padded", 61, 47, "interleaved", 12, (3,), width=16),
    Case("wide_serial", 20, 180, "serial", 9, (2, 3), width=7),
    Case("tall", 300, 20, "interleaved", 8, (9,), width=40),
    Case("own_trains", 24, 36, "interleaved", 5, (2, 3), shared=False, width=17),
    Case("many_threes", 243, 96, "interleaved", 3, (70,), width=64),
    Case("no_values", 16, 16, "interleaved", 2, (0,)),
    Case("no_features", 16, 16, "interleaved", 2, (2,), width=0),
    Case("large", 256, 512, "interleaved", 16, (2,), shared=False, width=64),
]
