"""The ONNX node of `qexport::quantum_attention`, for torch.onnx.export."""

import torch

from qexport.nn.functional import ATTRIBUTES
from qexport.ops import DOMAIN, QUANTUM_ATTENTION, VERSION


def translation_table() -> dict:
    """What torch.onnx.export takes as `custom_translation_table`."""
    import onnx
    from onnxscript import values

    from qexport.ops.proto import register_schemas

    register_schemas()
    schema = onnx.defs.get_schema(QUANTUM_ATTENTION.name, VERSION, DOMAIN)
    op = values.Op(values.Opset(DOMAIN, VERSION), QUANTUM_ATTENTION.name, schema)

    def translated(Q, K, V, attn_mask, seed, backend, dropout_p, need_weights, *more):
        attributes = {name: value for name, value in zip(ATTRIBUTES, more, strict=True) if value is not None}
        Y, _, _, weights, *_ = op(Q, K, V, attn_mask, None, None, None, seed, **attributes, qk_matmul_output_mode=3)
        return Y, weights

    return {torch.ops.qexport.quantum_attention.default: translated}
