"""The three ways to compute QuantumAttention, behind one signature: feeds by name and attributes in, outputs out."""

import functools

import ml_dtypes
import numpy as np
import onnx
import torch
from attention_cases import INPUT_NAMES
from cpu_sessions import cpu_session
from onnx import TensorProto, helper

from qexport import _core
from qexport.ops import DOMAIN, QUANTUM_ATTENTION, VERSION
from qexport.ops.proto import make_node
from qexport.ops.quantum_attention_ref import quantum_attention_ref
from qexport.ops.strategies import BLOCKWISE

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
OUTPUT_NAMES = tuple(param.name for param in QUANTUM_ATTENTION.outputs)


def rounded(feeds: dict, dtype: str) -> dict:
    """The feeds as float32 numbers that the type `dtype` can hold."""
    return {
        name: value.astype(DTYPES[dtype]).astype(np.float32) if value.dtype == np.float32 else value
        for name, value in feeds.items()
    }


def run_ref(feeds: dict, dtype: str, seed: int, attributes: dict) -> dict:
    """The torch reference in float64, not rounded to `dtype`."""
    tensors = {name: torch.from_numpy(v.astype(np.float64) if v.dtype == np.float32 else v) for name, v in feeds.items()}
    outputs = quantum_attention_ref(*(tensors.get(name) for name in INPUT_NAMES), seed=seed, **attributes)
    return {name: t.numpy() for name, t in zip(OUTPUT_NAMES, outputs, strict=True) if t is not None}


def run_binding(feeds: dict, dtype: str, seed: int, attributes: dict, threads: int = 1) -> dict:
    """The kernel through pybind11."""
    typed = {name: v.astype(DTYPES[dtype]) if v.dtype == np.float32 else v for name, v in feeds.items()}
    attributes = {name: value for name, value in QUANTUM_ATTENTION.resolve(attributes).items() if value is not None}
    outputs = _core.quantum_attention(
        *(typed.get(name) for name in INPUT_NAMES),
        seed=seed,
        **attributes,
        present=True,
        qk_matmul_output=True,
        error_estimate=attributes["strategy"] in BLOCKWISE,
        threads=threads,
    )
    return {n: np.asarray(v).astype(np.float32) for n, v in zip(OUTPUT_NAMES, outputs, strict=True) if v is not None}


_session = functools.cache(cpu_session)


def one_node_model(feeds: dict, dtype: str, outputs, attributes: dict) -> onnx.ModelProto:
    """A model around one QuantumAttention node. Its inputs and outputs are float32, with casts to `dtype` inside, since
    numpy has no bfloat16 of its own."""
    inputs, nodes, names = [], [], []
    for name in INPUT_NAMES:
        if name not in feeds:
            names.append("")
            continue
        value = feeds[name]
        element = helper.np_dtype_to_tensor_dtype(value.dtype)
        inputs.append(helper.make_tensor_value_info(name, element, [f"{name}_{i}" for i in range(value.ndim)]))
        if value.dtype == np.float32 and dtype != "float32":
            nodes.append(helper.make_node("Cast", [name], [f"{name}_cast"], to=ONNX_TYPES[dtype]))
            name = f"{name}_cast"
        names.append(name)
    inputs.append(helper.make_tensor_value_info("seed", TensorProto.INT64, []))
    last = max(OUTPUT_NAMES.index(name) for name in outputs)
    results = [f"{name}_typed" if name in outputs else "" for name in OUTPUT_NAMES[: last + 1]]
    nodes.append(make_node("QuantumAttention", [*names, "seed"], results, name="attention", **attributes))
    for name in outputs:
        nodes.append(helper.make_node("Cast", [f"{name}_typed"], [name], to=TensorProto.FLOAT))
    graph = helper.make_graph(
        nodes, "one_node", inputs, [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run_ort(feeds: dict, dtype: str, seed: int, attributes: dict, threads: int = 1) -> dict:
    """The op inside onnxruntime."""
    # onnxruntime wants both present outputs or none, and no past together with nonpad_kv_seqlen
    absent = {"present_key_summary"}  # needs key_summary: test_key_summary.py
    absent |= set() if "past_key" in feeds else {"present_key", "present_value"}
    if QUANTUM_ATTENTION.resolve(attributes)["strategy"] not in BLOCKWISE:
        absent.add("error_estimate")
    outputs = [name for name in OUTPUT_NAMES if name not in absent]
    model = one_node_model(feeds, dtype, outputs, attributes).SerializeToString()
    values = _session(model, threads=threads).run(outputs, {**feeds, "seed": np.array(seed, np.int64)})
    return dict(zip(outputs, values, strict=True))


BACKENDS = {"binding": run_binding, "ort": run_ort}
