"""restore_attention: a QuantumAttention that the model brought along becomes the Attention it stands for.

    QuantumAttention(Q, K, V, mask, past_key, past_value, nonpad, seed, ...) -> Attention(Q, K, V, mask, ..., nonpad)

Modules of qexport.nn export as QuantumAttention. The classical model, which the converted one is compared with, needs
Attention there; how the module samples is kept on the node for `sample_attention`.
"""

import json

import onnx_ir as ir

from qexport.ops import DOMAIN, QUANTUM_ATTENTION
from qexport.recipe import SAMPLING
from qexport.rewrite.graph import attribute
from qexport.rewrite.sample_attention import COPIED, SAMPLED_AS, take_over

_INPUTS = [param.name for param in QUANTUM_ATTENTION.inputs].index("seed")
_OUTPUTS = [param.name for param in QUANTUM_ATTENTION.outputs].index("qk_matmul_output") + 1


def restore_attention(model: ir.Model) -> None:
    """Replace every QuantumAttention of `model` in place."""
    for node in list(model.graph.all_nodes()):
        if node.domain == DOMAIN and node.op_type == QUANTUM_ATTENTION.name:
            _restore(node)
    if not any(node.domain == DOMAIN for node in model.graph.all_nodes()):  # noise that the model brought along stays
        model.graph.opset_imports.pop(DOMAIN, None)


def _restore(node: ir.Node) -> None:
    sampled = {key: attribute(node, key) for key in (*SAMPLING, "layer")}
    seed = node.inputs[_INPUTS].const_value if len(node.inputs) > _INPUTS and node.inputs[_INPUTS] is not None else None
    if seed is not None:
        sampled["seed"] = int(seed.numpy())
    inputs = list(node.inputs[:_INPUTS])
    while inputs and inputs[-1] is None:
        inputs.pop()
    # A window that is off is left out: Attention knows windows from opset 25 on.
    copied = [node.attributes[key] for key in COPIED if key in node.attributes]
    copied = [a for a in copied if not (a.name.endswith("window_size") and a.value < 0)]
    used = [i for i, value in enumerate(node.outputs[:_OUTPUTS]) if i == 0 or value.uses() or value.is_graph_output()]
    outputs = [ir.Value(name=None if i in used else "") for i in range(used[-1] + 1)]
    new = ir.Node(
        "",
        "Attention",
        inputs,
        copied,
        outputs=outputs,
        name=node.name,
        metadata_props={**node.metadata_props, SAMPLED_AS: json.dumps(sampled)},
    )
    take_over(node, new)
