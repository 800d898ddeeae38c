"""attn_mask from the masks of com.microsoft's attention ops: key padding in its three forms, and an additive bias.

(batch, keys) or (batch, queries, keys)    1 = attend
(batch,)                                   number of keys to attend
"""

import numpy as np
import onnx_ir as ir

from qexport.rewrite import DeclinedError
from qexport.rewrite.graph import Builder
from qexport.rewrite.values import known_size, rank


def runtime_mask(builder: Builder, padding, bias, filler: float, k: ir.Value, past) -> ir.Value | None:
    """The attn_mask of an Attention on Q and K in 3-D or 4-D form, None when there is neither.

    Raises:
        DeclinedError: the padding mask has a form that is not known.
    """
    if padding is None:
        return bias
    keep = _keep(builder, padding, k, past)
    if bias is None:
        return keep
    low = builder.node("CastLike", builder.const(np.float32(filler)), bias, like=bias, shape=[])
    zero = builder.node("CastLike", builder.const(np.float32(0)), bias, like=bias, shape=[])
    added = builder.node("Where", keep, zero, low, like=bias, shape=[None, 1, None, None])
    return builder.node("Add", bias, added, like=bias, shape=[None] * 4)


def _keep(builder: Builder, padding: ir.Value, k: ir.Value, past) -> ir.Value:
    """Boolean, true = attend, with four axes."""
    axes = rank(padding)
    if axes == 1:
        if past is not None:
            raise DeclinedError("its padding mask gives lengths, together with past keys")
        if (
            known_size(padding, 0) is not None
            and known_size(k, 0) is not None
            and known_size(padding, 0) != known_size(k, 0)
        ):
            raise DeclinedError("its padding mask gives start and end positions")
        axis = 1 if rank(k) == 3 else 2
        count = builder.node("Squeeze", builder.axes(k, axis, axis + 1), [0], dtype=ir.DataType.INT64, shape=[])
        places = builder.node(
            "Range", builder.const(np.int64(0)), count, builder.const(np.int64(1)), dtype=ir.DataType.INT64, shape=[None]
        )
        lengths = builder.node("Cast", padding, to=7, dtype=ir.DataType.INT64, shape=padding.shape)
        lengths = builder.node("Unsqueeze", lengths, [1], dtype=ir.DataType.INT64, shape=[None, 1])
        flag = builder.node("Less", places, lengths, dtype=ir.DataType.BOOL, shape=[None, None])
        axes = 2
    elif axes in (2, 3, 4):
        flag = builder.node("Cast", padding, to=9, dtype=ir.DataType.BOOL, shape=padding.shape)
    else:
        raise DeclinedError("the number of axes of its padding mask is unknown")
    if axes == 4:
        return flag
    dims = list(flag.shape) if flag.shape is not None else [None] * axes
    where, shape = ([1, 2], [dims[0], 1, 1, dims[1]]) if axes == 2 else ([1], [dims[0], 1, *dims[1:]])
    return builder.node("Unsqueeze", flag, where, dtype=ir.DataType.BOOL, shape=shape)
