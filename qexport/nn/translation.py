"""The ONNX nodes of the operators of `qexport.nn`, for torch.onnx.export."""

import torch

from qexport.nn.functional import ATTRIBUTES
from qexport.nn.noise import split_values
from qexport.ops import DOMAIN, QUANTUM_ATTENTION, QUANTUM_MEASURE, QUANTUM_NOISE, QUANTUM_OVERLAP, VERSION


def translation_table() -> dict:
    """What torch.onnx.export takes as `custom_translation_table`."""
    import onnx
    from onnxscript import values

    from qexport.ops.proto import register_schemas

    register_schemas()

    def op_of(spec):
        schema = onnx.defs.get_schema(spec.name, VERSION, DOMAIN)
        return values.Op(values.Opset(DOMAIN, VERSION), spec.name, schema)

    attention = op_of(QUANTUM_ATTENTION)

    def translated_attention(Q, K, V, attn_mask, seed, backend, dropout_p, need_weights, *more):
        attributes = {name: value for name, value in zip(ATTRIBUTES, more, strict=True) if value is not None}
        Y, _, _, weights, *_ = attention(Q, K, V, attn_mask, None, None, None, seed, **attributes, qk_matmul_output_mode=3)
        return Y, weights

    def translated(spec):
        op = op_of(spec)

        def call(*values):
            inputs, attributes = split_values(spec, values)
            while inputs[-1] is None:
                inputs = inputs[:-1]
            return op(*inputs, **attributes)

        return call

    others = (QUANTUM_NOISE, QUANTUM_OVERLAP, QUANTUM_MEASURE)
    return {torch.ops.qexport.quantum_attention.default: translated_attention} | {
        getattr(torch.ops.qexport, spec.stem).default: translated(spec) for spec in others
    }
