"""The models of `bench.seed_table`: one attention, and a multi-head layer around it, in ONNX, torch and float64."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qexport.ops import DOMAIN
from qexport.ops.proto import function_proto, make_node

N, D, HEADS, EMBED = 32, 64, 8, 512


def softmax_attention(Q, K, V):
    """Classical attention in float64, (..., n, d)."""
    Q, K, V = (np.asarray(x, dtype=np.float64) for x in (Q, K, V))
    scores = Q @ np.swapaxes(K, -1, -2) / Q.shape[-1] ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ V


def op_model(heads: int = 1, n: int = N, d: int = D, **attributes) -> onnx.ModelProto:
    """One QuantumAttention node (or, with no attributes, one ai.onnx Attention) with inputs Q, K, V and, sampled, seed."""
    inputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, heads, n, d]) for x in "QKV"]
    return _model([_attention(["Q", "K", "V"], "Y", attributes)], inputs, [1, heads, n, d], [], bool(attributes))


def layer_model(weights: dict[str, np.ndarray], **attributes) -> onnx.ModelProto:
    """The multi-head layer: x (1, N, EMBED) -> Y, sampled or, with no attributes, standard."""
    nodes = []
    for name in "qkv":
        nodes += [helper.make_node("MatMul", ["x", f"W{name}"], [f"x{name}"])]
        nodes += [helper.make_node("Add", [f"x{name}", f"b{name}"], [name])]
    heads = {"q_num_heads": HEADS, "kv_num_heads": HEADS}
    nodes += [_attention(["q", "k", "v"], "attended", attributes, **heads)]
    nodes += [
        helper.make_node("MatMul", ["attended", "Wo"], ["projected"]),
        helper.make_node("Add", ["projected", "bo"], ["Y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, N, EMBED])]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    return _model(nodes, inputs, [1, N, EMBED], initializers, bool(attributes))


def _attention(inputs, output, attributes, **heads):
    if not attributes:
        return helper.make_node("Attention", inputs, [output], **heads)
    return make_node("QuantumAttention", [*inputs, "", "", "", "", "seed"], [output], **heads, **attributes)


def _model(nodes, inputs, shape, initializers, sampled):
    functions = []
    if sampled:
        inputs = [*inputs, helper.make_tensor_value_info("seed", TensorProto.INT64, [])]
        functions = [function_proto("QuantumAttention")]
    output = helper.make_tensor_value_info("Y", TensorProto.FLOAT, shape)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph(nodes, "bench", inputs, [output], initializers)
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def layer_weights(rng) -> dict[str, np.ndarray]:
    """Weights ~ N(0, 1/EMBED), so that queries, keys and values are N(0, 1) like the op's inputs; biases 0.1 N(0, 1)."""
    weights = {f"W{name}": rng.standard_normal((EMBED, EMBED), dtype=np.float32) / EMBED**0.5 for name in "qkvo"}
    return weights | {f"b{name}": rng.standard_normal(EMBED, dtype=np.float32) / 10 for name in "qkvo"}


def layer_reference(x, weights):
    """The layer in float64."""
    x, w = np.asarray(x, dtype=np.float64), {name: value.astype(np.float64) for name, value in weights.items()}
    q, k, v = ((x @ w[f"W{n}"] + w[f"b{n}"]).reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2) for n in "qkv")
    return softmax_attention(q, k, v).swapaxes(1, 2).reshape(x.shape) @ w["Wo"] + w["bo"]


def torch_layers(weights) -> dict:
    """nn.MultiheadAttention with these weights, and QuantumMultiheadAttention on the same ones as it is by default."""
    import torch

    from qexport.nn import QuantumMultiheadAttention

    layer = torch.nn.MultiheadAttention(EMBED, HEADS, batch_first=True).eval()
    state = {
        "in_proj_weight": np.concatenate([weights[f"W{n}"].T for n in "qkv"]),
        "in_proj_bias": np.concatenate([weights[f"b{n}"] for n in "qkv"]),
        "out_proj.weight": weights["Wo"].T.copy(),
        "out_proj.bias": weights["bo"],
    }
    layer.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return {"nn.MultiheadAttention": layer, "QuantumMultiheadAttention": QuantumMultiheadAttention.from_classical(layer)}
