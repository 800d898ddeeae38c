"""The torch reference of MPSEncode: `qexport.mps.tt_svd`, in float64, padded to the op's fixed shapes."""

import torch

from qexport.mps.layout import Layout
from qexport.mps.tt_svd import tt_svd
from qexport.ops.mps_encode import SPEC


def mps_encode_ref(matrix, **attributes):
    """The train of a matrix; its signs, and what is equally good, may differ from the kernel's.

    Args:
        matrix: (..., rows, cols) tensor.
        attributes: those of the op table, with its defaults.

    Returns:
        (cores (..., numbers), ranks (..., sites + 1), error (...), lower_bound (...)).

    Raises:
        UsageError: an attribute or a shape outside its limits, a number that is not finite.
    """
    a = SPEC.resolve(attributes)
    layout = Layout(*matrix.shape[-2:], tuple(a["row_factors"]), tuple(a["col_factors"]))
    bonds = layout.bonds(a["bond_dim"])
    train = tt_svd(matrix, layout, bonds, a["tol"])
    padded = [
        torch.nn.functional.pad(core, (0, right - core.shape[-1], 0, 0, 0, 0, 0, left - core.shape[-4]))
        for core, left, right in zip(train.cores, bonds[:-1], bonds[1:], strict=True)
    ]
    cores = torch.cat([core.flatten(-4) for core in padded], -1)
    return cores.to(matrix.dtype), train.ranks, train.error, train.lower_bound
