"""The torch reference of MPSAttention."""

from qexport.mps.train import decode, unpack
from qexport.ops.mps_attention import SPEC
from qexport.ops.mps_decode import train_layout


def mps_attention_ref(cores, V, **attributes):
    """The matrix of the cores times V, in float64, rounded to their type.

    Args:
        cores: (numbers,), or (..., numbers) with the leading axes of V.
        V: (..., cols, features) tensor.
        attributes: those of the op table, with its defaults.

    Returns:
        (..., rows, features).

    Raises:
        UsageError: an attribute or the number of numbers.
    """
    a = SPEC.resolve(attributes)
    layout = train_layout(a)
    return (decode(unpack(cores.double(), layout, tuple(a["bonds"])), layout) @ V.double()).to(V.dtype)
