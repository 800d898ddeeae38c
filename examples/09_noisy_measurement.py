"""Attention as a noisy quantum device would measure it: Softmax, depolarizing noise on each qubit, 32 shots per query."""

import numpy as np
import onnx
from onnx import TensorProto, helper

import qexport
from qexport.ops.proto import function_proto, make_node

n = 64  # keys, the states of 6 qubits
nodes = [
    helper.make_node("Softmax", ["scores"], ["probabilities"]),
    make_node("QuantumNoise", ["probabilities", "level"], ["noisy"], channel="depolarizing"),
    make_node("QuantumMeasure", ["noisy", "seed"], ["frequencies"], shots=32),
]
shapes = {"scores": (TensorProto.FLOAT, [None, n]), "level": (TensorProto.FLOAT, None), "seed": (TensorProto.INT64, [])}
inputs = [helper.make_tensor_value_info(name, *shape) for name, shape in shapes.items()]
outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, n]) for name in ("probabilities", "frequencies")]
opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.qexport", 1)]
functions = [function_proto(op, 21) for op in ("QuantumNoise", "QuantumMeasure")]  # what runs without the library
graph = helper.make_graph(nodes, "noisy", inputs, outputs)
onnx.save(helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10), "noisy.onnx")
session = qexport.session("noisy.onnx")
scores = 2 * np.random.default_rng(0).standard_normal((500, n)).astype(np.float32)
for level in (0.0, 0.02, 0.1):  # of every qubit: an input, and no part of the file
    p, f = session.run(None, {"scores": scores, "level": np.array(level, np.float32), "seed": np.array(7)})
    print(f"level {level}: distance of 32 shots from the probabilities {np.abs(p - f).sum(-1).mean() / 2:.3f}")
print("without the library:", qexport.inspect("noisy.onnx")["fallbacks"]["com.qexport:QuantumNoise"])
