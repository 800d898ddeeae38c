"""The torch reference of MPSDecode."""

from qexport.mps.train import decode, unpack
from qexport.ops.mps_decode import SPEC, train_layout


def mps_decode_ref(cores, **attributes):
    """The matrix (..., rows, cols) of cores (..., numbers), in float64, rounded to their type.

    Args:
        cores: (..., numbers) tensor.
        attributes: those of the op table, with its defaults.

    Raises:
        UsageError: an attribute or the number of numbers.
    """
    a = SPEC.resolve(attributes)
    layout = train_layout(a)
    return decode(unpack(cores.double(), layout, tuple(a["bonds"])), layout).to(cores.dtype)
