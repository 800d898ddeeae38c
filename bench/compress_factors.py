"""Single weights, for `bench.compress`: how fast factors of low rank are, and what tensor trains of a weight are worth."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper

from bench import common
from qexport import runtime
from qexport.compression import nodes
from qexport.compression.forms import LOW_RANK, Method, Seen
from qexport.compression.layers import find_layers
from qexport.compression.quantize import quantize
from qexport.mps.layout import KINDS, make_layout
from qexport.mps.tt_svd import tt_svd
from qexport.profiling.calls import make_call
from qexport.profiling.timing import interleaved

SIZE, RANK = 1024, 64
INT4 = 4, 32  # bits, and the block that shares a scale
WEIGHTS = (
    "embeddings.word_embeddings",
    "embeddings.position_embeddings",
    "encoder.layer.0.attention.self.query",
    "encoder.layer.0.attention.self.value",
    "encoder.layer.0.intermediate.dense",
    "encoder.layer.5.output.dense",
)
# Bytes that forms of a weight are given, as shares of its float32 bytes; the first one is what int4 takes.
BUDGETS = (4.5 / 32, 0.035)


def low_rank_table(folder: Path, threads: int, rounds: int = 200) -> list[dict]:
    """A product with a dense weight, with its factors in float32, and with factors as `compress` writes them. The weight is
    random, for times alone."""
    W = np.random.default_rng(0).standard_normal((SIZE, SIZE), np.float32) / SIZE**0.5
    files = {"dense": _product(folder / "dense.onnx", [W])}
    U, sigma, V = np.linalg.svd(W)
    files[f"rank {RANK}, fp32"] = _product(folder / "fp32.onnx", [U[:, :RANK] * sigma[:RANK], V[:RANK]])
    for bits in (8, 4):
        model = ir.load(files["dense"])
        (layer,) = find_layers(model)
        form = Seen(layer, np.eye(SIZE)).make(Method(LOW_RANK, bits, 64, RANK))
        nodes.store(model, layer, form)
        files[f"rank {RANK}, int{bits}"] = folder / f"int{bits}.onnx"
        ir.save(model, files[f"rank {RANK}, int{bits}"])
    options, rows = runtime.quiet_options(threads), []
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    sessions = {name: runtime.session(file, library=False, options=options) for name, file in files.items()}
    for n in (1, 64):
        X = np.random.default_rng(n).standard_normal((n, SIZE), np.float32)
        times = interleaved({name: make_call(s, {"X": X}, []) for name, s in sessions.items()}, rounds, warmup=20)
        for name, taken in times.items():
            row = {"contender": name, "n": n, "bytes": files[name].stat().st_size, "ms": float(np.median(taken))}
            rows.append(row | common.ratio("x_dense", times["dense"], taken))
    return rows


def _product(file: Path, weights: list[np.ndarray]) -> Path:
    """A model that multiplies its input with the weights in turn."""
    names = ["X", *(f"Y{i}" for i in range(1, len(weights))), "Y"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [names[i], f"W{i}"], [names[i + 1]]) for i in range(len(weights))],
        "product",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["n", SIZE])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["n", SIZE])],
        [numpy_helper.from_array(np.ascontiguousarray(W), f"W{i}") for i, W in enumerate(weights)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), file)
    return file


def trains_table(classical: Path) -> list[dict]:
    """Relative Frobenius error of a weight in each form at the same bytes. Numbers of factors and of cores take two bytes,
    whose rounding is left out; int4 has one size only. The train is the better one of both layouts, in float64."""
    known = {layer.label: layer for layer in find_layers(ir.load(classical))}
    rows = []
    for label in WEIGHTS:
        W = known[label].stored()
        inputs, outputs = W.shape
        sigma = np.linalg.svd(W.astype(np.float64), compute_uv=False)
        for budget in BUDGETS:
            numbers = int(budget * W.size * 4 / 2)
            rank = numbers // (inputs + outputs)
            trains = {kind: _train(W, kind, numbers) for kind in KINDS}
            layout = min(trains, key=lambda kind: trains[kind][1])
            bond_dim, error = trains[layout]
            row = {"weight": label, "inputs": inputs, "outputs": outputs, "bytes": 2 * numbers, "x_fp32": 1 / budget}
            row |= {"int4_error": _int4_error(known[label]) if budget == BUDGETS[0] else None}
            row |= {"rank": rank, "rank_error": float((np.square(sigma[rank:]).sum() / np.square(sigma).sum()) ** 0.5)}
            rows.append(row | {"layout": layout, "bond_dim": bond_dim, "train_error": error})
    return rows


def _int4_error(layer) -> float:
    W = layer.matrix()
    return common.relative_error(quantize(W, *INT4).dense(), W)


def _train(W: np.ndarray, kind: str, numbers: int) -> tuple[int, float]:
    """The largest bond dimension whose cores hold at most so many numbers, and the error of the train."""
    layout = make_layout(kind, *W.shape)
    low, high = 1, numbers
    while low < high:
        middle = (low + high + 1) // 2
        fits = layout.numbers(layout.bonds(middle)) <= numbers
        low, high = (middle, high) if fits else (low, middle - 1)
    return low, float(tt_svd(torch.from_numpy(W), layout, layout.bonds(low)).error)
