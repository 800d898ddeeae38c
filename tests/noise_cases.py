"""Inputs of QuantumNoise and QuantumMeasure, every channel in every form that the op table allows, and the ways to compute
them."""

import functools

import numpy as np
import torch
from attention_backends import DTYPES, ONNX_TYPES
from cpu_sessions import cpu_session
from onnx import TensorProto, helper

from qexport import _core
from qexport.noise.channels import num_qubits
from qexport.ops import DOMAIN, QUANTUM_NOISE, QUANTUM_OVERLAP, VERSION
from qexport.ops.proto import function_proto, make_node, spec_of
from qexport.ops.quantum_measure_ref import quantum_measure_ref
from qexport.ops.quantum_noise_ref import quantum_noise_ref

TYPES = {**DTYPES, "float64": np.float64}
ELEMENTS = {**ONNX_TYPES, "float64": TensorProto.DOUBLE}
PARAMETERS = tuple(param.name for param in QUANTUM_NOISE.inputs[1:])
OVERLAP_PARAMETERS = tuple(param.name for param in QUANTUM_OVERLAP.inputs[2:])
# (attributes, whether the parameters are one per qubit)
CHANNELS = tuple(
    ({"channel": channel, **more}, per_qubit)
    for channel in QUANTUM_NOISE.attribute("channel").choices
    for more in (
        [{"convention": c, "scope": s} for c in ("replace", "error") for s in ("local", "global")]
        if channel == "depolarizing"
        else [{}]
    )
    for per_qubit in ((False,) if more.get("scope") == "global" else (False, True))
)
NAMED = tuple(case for case in CHANNELS if case[0]["channel"] != "kraus")  # what a NoiseModel can be
NAMES = tuple(dict.fromkeys(attributes["channel"] for attributes, _ in NAMED))
BASES = QUANTUM_NOISE.attribute("basis").choices


def name_of(case) -> str:
    attributes, per_qubit = case
    return "-".join([*attributes.values(), *(["per_qubit"] if per_qubit else [])])


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    """float64 rows of probabilities, some of them 0."""
    rng = np.random.default_rng(seed)
    p = rng.exponential(size=shape) * (rng.random(shape) < 0.9)
    p[..., 0] += 0.1
    return p / p.sum(-1, keepdims=True)


def isometries(*shape: int, seed: int = 0) -> np.ndarray:
    """Random (..., rows, columns) complex matrices with orthonormal columns, as (..., rows, columns, 2)."""
    parts = np.random.default_rng(seed).standard_normal((2, *shape))
    matrices = np.linalg.qr(parts[0] + 1j * parts[1])[0]
    return np.stack([matrices.real, matrices.imag], -1)


def random_kraus(*shape: int, operators: int = 3, seed: int = 0) -> np.ndarray:
    """Random Kraus operators (..., operators, 2, 2, 2): of no named channel, and with complex maps of density matrices."""
    return isometries(*shape, 2 * operators, 2, seed=seed).reshape(*shape, operators, 2, 2, 2)


def parameters(attributes: dict, per_qubit: bool, n: int, seed: int = 0) -> dict:
    """float64 inputs of the channel, within its limits."""
    rng = np.random.default_rng(seed)
    shape = (num_qubits(n),) if per_qubit else ()
    if attributes["channel"] == "readout" and per_qubit:
        shape = (*shape, 2)
    level = {"level": rng.random(shape)}
    if attributes["channel"] == "kraus":
        return {**level, "kraus": random_kraus(*shape, seed=seed)}
    if attributes["channel"] != "thermal_relaxation":
        return level
    T1 = rng.uniform(0.5, 2, shape)
    return {**level, "T1": T1, "T2": T1 * rng.uniform(0.1, 2, shape), "excited_population": rng.random(shape)}


def noise_ref(p, given: dict, attributes: dict) -> tuple[np.ndarray, np.ndarray]:
    noisy, leak = quantum_noise_ref(torch.from_numpy(p), *(given.get(name) for name in PARAMETERS), **attributes)
    return noisy.numpy(), leak.numpy()


def measure_ref(p, seed: int, dtype: str = "float64", **attributes) -> np.ndarray:
    """`p` are float64 numbers that the type can hold; so is what comes back."""
    return quantum_measure_ref(torch.from_numpy(p).to(getattr(torch, dtype)), seed, **attributes).double().numpy()


def noise_binding(p, given: dict, attributes: dict, dtype: str = "float64", threads: int = 1):
    resolved = QUANTUM_NOISE.resolve(attributes)
    outputs = _core.quantum_noise(p.astype(TYPES[dtype]), *(given.get(n) for n in PARAMETERS), **resolved, threads=threads)
    return tuple(output.astype(np.float64) for output in outputs)


def measure_binding(p, seed: int, dtype: str = "float64", threads: int = 1, **attributes):
    resolved = spec_of("QuantumMeasure").resolve(attributes)
    return _core.quantum_measure(p.astype(TYPES[dtype]), seed, **resolved, threads=threads).astype(np.float64)


def overlap_binding(queries, keys, given: dict, attributes: dict, dtype: str = "float64", threads: int = 1) -> np.ndarray:
    inputs = [x.astype(TYPES[dtype]) for x in (queries, keys)]
    resolved = QUANTUM_OVERLAP.resolve(attributes)
    found = _core.quantum_overlap(*inputs, *(given.get(name) for name in OVERLAP_PARAMETERS), **resolved, threads=threads)
    return found.astype(np.float64)


def noise_ort(p, given: dict, attributes: dict, dtype: str = "float64", threads: int = 1, fallback: bool = False):
    parameter = "float64" if dtype == "float64" else "float32"
    feeds = {"probabilities": p.astype(np.float64)} | {
        name: np.asarray(given[name], np.float64) for name in PARAMETERS if name in given
    }
    types = {name: parameter if name in PARAMETERS else dtype for name in feeds}
    outputs = {"noisy": "float64", "leak": "float64"}
    return run_node("QuantumNoise", feeds, types, outputs, attributes, threads, fallback)


def measure_ort(p, seed: int, dtype: str = "float64", threads: int = 1, fallback: bool = False, **attributes):
    feeds = {"probabilities": p.astype(np.float64), "seed": np.array(seed, np.int64)}
    outputs = {"frequencies": "float64"}
    return run_node("QuantumMeasure", feeds, {"probabilities": dtype}, outputs, attributes, threads, fallback)[0]


def one_node_model(op_name: str, feeds: dict, types: dict, outputs, attributes: dict, fallback: bool = False):
    """A model around one node. Inputs and outputs are double, with casts to and from `types` inside."""
    spec = spec_of(op_name)
    nodes = [helper.make_node("Cast", [name], [f"{name}_typed"], to=ELEMENTS[types[name]]) for name in types]
    names = [f"{param.name}_typed" if param.name in types else param.name for param in spec.inputs]
    names = [name if name.removesuffix("_typed") in feeds else "" for name in names]
    nodes.append(make_node(op_name, names, [f"{name}_typed" for name in outputs], name="node", **attributes))
    nodes += [helper.make_node("Cast", [f"{name}_typed"], [name], to=TensorProto.DOUBLE) for name in outputs]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in outputs]
    graph = helper.make_graph(nodes, "one_node", inputs, results)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    functions = [function_proto(op_name, 21, len(outputs))] if fallback else []
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


_session = functools.cache(cpu_session)


def run_node(op_name, feeds, types, outputs, attributes, threads=1, fallback=False) -> tuple[np.ndarray, ...]:
    model = one_node_model(op_name, feeds, types, outputs, attributes, fallback)
    return tuple(_session(model.SerializeToString(), library=not fallback, threads=threads).run(None, feeds))
