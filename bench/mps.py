"""Matrix product states: MPSEncode and MPSDecode against other packages, what layouts save, and products.

    python -m bench.mps [--threads 2] [--runs 20] [--json FILE]

encode        a softmax matrix at bond dimension 32, float32, interleaved sites: the kernel, then tensorly, quimb and tntorch
              where they are installed, these on the same matrix with its digits sorted already
layouts       bytes against the dense matrix and the error of the output, by distance and with Gaussian Q and K
trained       the attention of MiniLM's heads on a text of 256 tokens: error and bytes by bond dimension and layer
products      mps_attention_forward, 64 features, against the product core by core and through the matrix (made each time) in
              torch, and against the matrix at hand; the estimate is for one thread
linear        MPOLinear with constant cores against onnxruntime's MatMul by the matrix, and core by core in torch
goals         those of bench/goals.toml that are decided here

Times of `encode` are the fastest of the runs, since thread pools get in each other's way; those of products are medians of
runs that took turns. Errors are relative Frobenius errors;
`reported` is what MPSEncode says, `error` what its cores make of the matrix.
"""

import importlib
import itertools
import math
import time

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

import qexport
from bench import common
from bench.activations import activations
from bench.attention import goals
from qexport import _core
from qexport.errors import QexportError
from qexport.mps.cost import DENSE, attention_cost, linear_cost
from qexport.mps.layout import KINDS, make_layout
from qexport.mps.train import apply, decode
from qexport.nn.backends import torch_pool
from qexport.nn.mps import AttentionMPS, MatrixProductStateSimulator
from qexport.ops import DOMAIN, VERSION
from qexport.ops.proto import make_node
from qexport.profiling.timing import interleaved
from qexport.runtime import quiet_options

BOND_DIM = 32
FEATURES = 64
PEERS = ("tensorly", "quimb", "tntorch")


def gaussian_inputs(n: int):
    generator = torch.Generator().manual_seed(n)
    return tuple(torch.randn(n, FEATURES, generator=generator) for _ in range(3))


def distance_inputs(n: int, width: float = 5.0):
    """Q, K, V whose attention is exp(-(i - j)^2 / 2 width^2), up to the norm of a row; float64, as scores are large."""
    place = torch.arange(n, dtype=torch.float64) - n / 2
    Q = torch.stack([place, torch.ones_like(place)], -1) * math.sqrt(2) / width**2
    return Q, torch.stack([place, -place.square() / 2], -1), gaussian_inputs(n)[2].double()


INPUTS = {"by distance": distance_inputs, "Gaussian": gaussian_inputs}


def attention(Q, K) -> np.ndarray:
    return torch.softmax(Q.double() @ K.double().mT / Q.shape[-1] ** 0.5, -1).float().numpy()


def milliseconds(call, runs: int) -> float:
    """The fastest of the runs."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def others(M: np.ndarray, layout, bonds) -> dict:
    """Calls of other packages that decompose the same tensor, its sites in their order."""
    sites = len(layout.row_factors)
    tensor = M.reshape(layout.row_factors + layout.col_factors)
    tensor = tensor.transpose([axis for k in range(sites) for axis in (k, sites + k)])
    tensor = np.ascontiguousarray(tensor).reshape(
        [r * c for r, c in zip(layout.row_factors, layout.col_factors, strict=True)]
    )
    calls = {}
    for name in PEERS:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        if name == "tensorly":
            from tensorly.decomposition import tensor_train

            calls[name] = lambda: tensor_train(tensor, rank=list(bonds))
        elif name == "tntorch":
            from tntorch import Tensor

            calls[name] = lambda: Tensor(torch.from_numpy(tensor), ranks_tt=list(bonds[1:-1]))
        else:
            from quimb.tensor import MatrixProductState

            calls[name] = lambda: MatrixProductState.from_dense(tensor.ravel(), dims=tensor.shape, max_bond=BOND_DIM)
    return calls


def encode_table(threads: int, runs: int) -> list[dict]:
    rows, theirs = [], []
    for n in (64, 256, 1024):
        M = attention(*gaussian_inputs(n)[:2])
        layout = make_layout("interleaved", n, n)
        factors = {"row_factors": layout.row_factors, "col_factors": layout.col_factors}
        bonds = layout.bonds(BOND_DIM)
        cores, _, reported, bound = _core.mps_encode(M, **factors, bond_dim=BOND_DIM, tol=0.0)
        exact = [M.astype(np.float64)]
        found = _core.mps_decode(cores.astype(np.float64), rows=n, cols=n, bonds=bonds, **factors)
        error = common.relative_error(found, exact[0])
        if not abs(error - float(reported)) <= 1e-6 * error:
            raise SystemExit(f"MPSEncode reports {float(reported):.9g}, the error is {error:.9g}")

        def ours(M=M, factors=factors):
            _core.mps_encode(M, **factors, bond_dim=BOND_DIM, tol=0.0, threads=threads, pool=torch_pool())

        def back(cores=cores, factors=factors, bonds=bonds, n=n):
            _core.mps_decode(cores, rows=n, cols=n, bonds=bonds, **factors, threads=threads)

        took = milliseconds(ours, runs)
        row = {"n": n, "ms": took, "decode_ms": milliseconds(back, runs), "error": error, "reported": float(reported)}
        row |= {"lower_bound": float(bound)}
        rows.append(row)
        theirs.append(others(M, layout, bonds))
    for row, calls in zip(rows, theirs, strict=True):  # behind all of ours: their thread pools keep processors busy
        times = {name: milliseconds(call, 11 if row["n"] < 1024 else 3) for name, call in calls.items()}
        for name in PEERS:
            row |= {f"{name}_ms": times.get(name), f"x_{name}": times[name] / row["ms"] if name in times else None}
        row["x_best_other"] = min(times.values()) / row["ms"] if times else None
    return rows


def layout_table() -> list[dict]:
    rows = []
    for n in (256, 1024):
        for data, inputs in INPUTS.items():
            Q, K, V = inputs(n)
            for layout in (*KINDS, "auto"):
                row = {"n": n, "data": data, "layout": layout, "bond_dim": BOND_DIM}
                loose = MatrixProductStateSimulator(BOND_DIM, tolerance=0.999, layout=layout)
                report = loose.encode_attention_mps(Q, K, V).report
                row |= {"x_dense_bytes": report.compression, "state_error": report.state_error}
                row |= {"output_error": report.output_error, "chosen": report.layout}
                try:
                    MatrixProductStateSimulator(BOND_DIM, layout=layout).encode_attention_mps(Q, K, V)
                    rows.append(row | {"refused": 0})
                except QexportError:
                    rows.append(row | {"refused": 1})
    return rows


def trained_table() -> list[dict]:
    """Each head by itself, in the layout that suits it. `kept` heads have an output that is off by 0.1 at most, which the
    simulator does not refuse; `low_rank_error` is that of the best factors of low rank with as many numbers."""
    Q, K, V = (torch.from_numpy(array) for array in activations("minilm-256"))
    layers, heads, n = Q.shape[:3]
    sigma = torch.linalg.svdvals(torch.softmax(Q.double() @ K.double().mT / Q.shape[-1] ** 0.5, -1))
    rows = []
    for bond_dim in (8, 16, 32):
        simulator = MatrixProductStateSimulator(bond_dim, tolerance=0.999)
        found = []
        for layer, head in itertools.product(range(layers), range(heads)):
            report = simulator.encode_attention_mps(Q[layer, head], K[layer, head], V[layer, head]).report
            values, rank = sigma[layer, head], report.bytes // Q.element_size() // (2 * n)
            low_rank = float((values[rank:].square().sum() / values.square().sum()).sqrt())
            found.append((layer + 1, report, (report.state_error, report.output_error, low_rank)))
        for layer in ("all", *range(1, layers + 1)):
            reports = [report for number, report, _ in found if layer in ("all", number)]
            errors = np.array([error for number, _, error in found if layer in ("all", number)])
            row = {"bond_dim": bond_dim, "layer": layer, "heads": len(reports)}
            row |= {"x_dense_bytes": float(np.median([report.compression for report in reports]))}
            for i, name in enumerate(("error", "output_error", "low_rank_error")):
                row |= {f"{name}_median": float(np.median(errors[:, i])), f"{name}_best": float(errors[:, i].min())}
            row |= {"interleaved": sum(report.layout == "interleaved" for report in reports)}
            rows.append(row | {"kept": int((errors[:, 1] <= 0.1).sum())})
    return rows


def random_train(n: int, bond_dim: int) -> AttentionMPS:
    """A matrix of Gaussian cores, with interleaved sites: products take the same time whatever the numbers are."""
    layout = make_layout("interleaved", n, n)
    generator = torch.Generator().manual_seed(n + bond_dim)
    shapes = layout.shapes(layout.bonds(bond_dim))
    cores = tuple(torch.randn(shape, generator=generator) / shape[0] ** 0.5 for shape in shapes)
    return AttentionMPS(cores, layout, torch.tensor(layout.bonds(bond_dim)), torch.tensor(0.0), torch.tensor(0.0), None)


def check(found, cores, layout, V) -> None:
    error = common.relative_error(found, apply(tuple(core.double() for core in cores), layout, V.double()))
    if not error <= 1e-5:
        raise SystemExit(f"a product of {layout.rows} x {layout.cols} is off by {error:.2g}")


def compared(row: dict, times: dict, cost) -> dict:
    """Medians of calls that took turns: `ours` beside the others."""
    medians = {name: float(np.median(values)) for name, values in times.items()}
    ours = medians.pop("ours")
    row |= {"method": cost.method, "groups": "+".join(map(str, cost.groups))}
    row |= {"estimated_ms": (cost.dense if cost.method == DENSE else cost.factored) / 1e6, "ms": ours}
    return row | {f"{name}_ms": value for name, value in medians.items()} | {"x_best": min(medians.values()) / ours}


def product_table(runs: int) -> list[dict]:
    """mps_attention_forward beside the same product core by core, and through the matrix, in torch, float32."""
    rows, forward = [], MatrixProductStateSimulator().mps_attention_forward
    for n, bond_dim in itertools.product((256, 1024, 4096), (4, 8, 16, 32)):
        train, V = random_train(n, bond_dim), torch.randn(n, FEATURES)
        cores, layout, M = train.cores, train.layout, decode(train.cores, train.layout)
        check(forward(train, V), cores, layout, V)
        calls = {
            "ours": lambda train=train, V=V: forward(train, V),
            "factored": lambda cores=cores, layout=layout, V=V: apply(cores, layout, V),
            "dense": lambda cores=cores, layout=layout, V=V: decode(cores, layout) @ V,
        }
        times = interleaved(calls, runs if n < 4096 else 5)
        row = compared({"n": n, "bond_dim": bond_dim}, times, attention_cost(layout, train.bonds, FEATURES))
        matrix = interleaved({"matrix": lambda M=M, V=V: M @ V}, runs if n < 4096 else 5)["matrix"]
        rows.append(row | {"matrix_ms": float(np.median(matrix)), "x_matrix": float(np.median(matrix)) / row["ms"]})
    return rows


def layer(n: int, weight: np.ndarray, threads: int, attributes: dict | None = None):
    """A session of one layer: MatMul by a weight, or MPOLinear by cores, both initializers."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    if attributes:
        node = make_node("MPOLinear", ["x", "w"], ["y"], **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", n]) for name in "xy"]
    graph = helper.make_graph([node], "layer", values[:1], values[1:], [numpy_helper.from_array(weight, "w")])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = quiet_options(threads)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # beside the threads of the other session
    options.register_custom_ops_library(qexport.get_library_path())
    return common.onnxruntime().InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def linear_table(threads: int, runs: int) -> list[dict]:
    """MPOLinear with constant cores beside onnxruntime's MatMul with the matrix, and core by core in torch, float32."""
    rows = []
    for n, bond_dim in itertools.product((256, 1024, 4096), (4, 8, 16, 32)):
        train = random_train(n, bond_dim)
        cores, layout = train.cores, train.layout
        mirrored = tuple(core.transpose(-3, -2).contiguous() for core in cores)  # core by core, x W is (W^T x^T)^T
        factors = {"row_factors": layout.row_factors, "col_factors": layout.col_factors}
        attributes = {"rows": n, "cols": n, "bonds": train.bonds, **factors}
        ours = layer(n, train.packed().numpy(), threads, attributes)
        matmul = layer(n, decode(cores, layout).numpy(), threads)
        for tokens in (1, 8, 64):
            x = torch.randn(tokens, n)
            feeds = {"x": x.numpy()}
            check(ours.run(None, feeds)[0].T, mirrored, layout, x.T)
            calls = {
                "ours": lambda feeds=feeds, ours=ours: ours.run(None, feeds),
                "dense": lambda feeds=feeds, matmul=matmul: matmul.run(None, feeds),
            }
            rounds = runs if n < 4096 else 7
            times = interleaved(calls, rounds)
            # By itself: threads of torch, which spin for a while, would take the processors from those of onnxruntime.
            times |= interleaved({"factored": lambda x=x: apply(mirrored, layout, x.T)}, rounds)  # noqa: B023
            row = {"n": n, "bond_dim": bond_dim, "tokens": tokens}
            rows.append(compared(row, times, linear_cost(layout, train.bonds, tokens)))
    return rows


def main():
    arguments = common.parser(__doc__.split("\n")[0], runs=20).parse_args()
    torch.set_num_threads(arguments.threads)
    tables = {"encode": encode_table(arguments.threads, arguments.runs), "layouts": layout_table()}
    tables["trained"] = trained_table()
    tables["products"] = product_table(arguments.runs)
    tables["linear"] = linear_table(arguments.threads, arguments.runs)
    tables["goals"] = goals.judged(tables, _core.isa(), file="mps")
    parameters = {"bond_dim": BOND_DIM, "features": FEATURES, "runs": arguments.runs}
    common.report("mps", arguments.threads, parameters, tables, arguments.json)


if __name__ == "__main__":
    main()
