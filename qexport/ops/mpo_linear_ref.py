"""The torch reference of MPOLinear."""

from qexport.mps.train import decode, unpack
from qexport.ops.mpo_linear import SPEC
from qexport.ops.mps_decode import train_layout


def mpo_linear_ref(x, cores, bias=None, **attributes):
    """x times the matrix of the cores, plus the bias, in float64, rounded to their type.

    Args:
        x: (..., rows) tensor.
        cores: (numbers,) tensor.
        bias: (cols,) tensor, or None.
        attributes: those of the op table, with its defaults.

    Returns:
        (..., cols).

    Raises:
        UsageError: an attribute or the number of numbers.
    """
    a = SPEC.resolve(attributes)
    layout = train_layout(a)
    y = x.double() @ decode(unpack(cores.double(), layout, tuple(a["bonds"])), layout)
    return (y if bias is None else y + bias.double()).to(x.dtype)
