"""Noise and measurement of rows of probabilities: latency of the ops, and of noisy sampled attention, with its goals.

    python -m bench.noise [--runs 2000] [--json FILE]

ops           QuantumNoise and QuantumMeasure alone, in an onnxruntime session with bound inputs and outputs
attention     softmax(q k^T / sqrt(d)) -> QuantumNoise -> QuantumMeasure -> V, one head, and the same without noise and shots
density       the same noisy probabilities from a density matrix, by the torch reference
packages      the same noisy probabilities from the density matrices of other packages, calls interleaved
kraus         any Kraus operators and unitaries, beside qiskit-aer's density matrices: bench/noise_density.py
goals         those of bench/goals.toml that are decided here

Everything is compared with the float64 reference before it is timed. `error` is the largest difference of any probability.
"""

import numpy as np
import torch
from onnx import TensorProto, helper

from bench import common, noise_packages
from bench.attention import goals
from bench.noise_density import kraus_table
from qexport import _core
from qexport.installed import get_library_path
from qexport.noise.channels import num_qubits
from qexport.noise.density import apply_kraus, density_matrix, kraus_operators
from qexport.ops import DOMAIN
from qexport.ops.proto import make_node
from qexport.ops.quantum_measure_ref import quantum_measure_ref
from qexport.ops.quantum_noise_ref import quantum_noise_ref
from qexport.profiling.timing import interleaved
from qexport.runtime import create_session, quiet_options, register_library, run_bound

LEVEL = 0.02
SHOTS = 32
HEAD_SIZE = 64
ROWS = 64
LARGEST_ERROR = 1e-6


def bound(nodes, feeds: dict, output: np.ndarray, initializers: dict, threads: int):
    """A call that runs `nodes` on `feeds` into `output`, where all of them lie."""
    values = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape) for n, x in feeds.items()]
    weights = [helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape, x) for n, x in initializers.items()]
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, output.shape)
    graph = helper.make_graph(nodes, "noise", values, [result], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = quiet_options(threads)
    register_library(options, get_library_path())
    session = create_session("noise", model.SerializeToString(), options, ["CPUExecutionProvider"], True)
    binding = session.io_binding()
    for name, x in feeds.items():
        binding.bind_input(name, "cpu", 0, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape, x.ctypes.data)
    binding.bind_output("y", "cpu", 0, TensorProto.FLOAT, output.shape, output.ctypes.data)

    def call(_kept=(feeds, output)):  # the binding knows addresses alone
        run_bound(session, binding)

    return call


def checked(name: str, call, output: np.ndarray, want: np.ndarray, most: float = LARGEST_ERROR) -> float:
    """The largest difference after one call; ends the benchmark where it is above `most`."""
    call()
    error = float(np.abs(output - want).max())
    if not error <= most:
        raise SystemExit(f"{name} is off by {error:.3g}, allowed is {most:g}")
    return error


def microseconds(calls: dict, runs: int) -> dict[str, float]:
    return {name: 1e3 * float(np.median(ms)) for name, ms in interleaved(calls, runs, warmup=50).items()}


def probabilities(n: int) -> np.ndarray:
    scores = np.random.default_rng(n).standard_normal((ROWS, n))
    return (np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)).astype(np.float32)


def normalized(p: np.ndarray) -> torch.Tensor:
    """float64 rows that sum to one as exactly as float64 rows must."""
    exact = torch.from_numpy(p).double()
    return exact / exact.sum(-1, keepdim=True)


def op_table(threads: int, runs: int) -> list[dict]:
    rows, calls = [], {}
    for n in (64, 50, 256, 1024):
        p = probabilities(n)
        exact = normalized(p)
        settings = {
            ("QuantumNoise", "z"): {},
            ("QuantumNoise", "x"): {"basis": "x"},
            ("QuantumNoise", "global"): {"scope": "global"},
            ("QuantumMeasure", f"{SHOTS} shots"): {"shots": SHOTS},
        }
        for (op, what), attributes in settings.items():
            output = np.zeros_like(p)
            if op == "QuantumNoise":
                node = make_node(op, ["p", "level"], ["y"], **attributes)
                want = quantum_noise_ref(exact, LEVEL, **attributes)[0].numpy()
                feeds = {"p": p, "level": np.array(LEVEL, np.float32)}
            else:
                node = make_node(op, ["p", "seed"], ["y"], **attributes)
                want = quantum_measure_ref(torch.from_numpy(p), 7, **attributes).numpy()
                feeds = {"p": p, "seed": np.array(7, np.int64)}
            call = calls[op, what, n] = bound([node], feeds, output, {}, threads)
            error = checked(f"{op} {what}", call, output, want)
            rows.append({"op": op, "what": what, "rows": ROWS, "n": n, "qubits": num_qubits(n), "error": error})
    times = microseconds(calls, runs)
    return [row | {"p50_us": times[row["op"], row["what"], row["n"]]} for row in rows]


def attention_table(threads: int, runs: int) -> list[dict]:
    rows, calls = [], {}
    for n in (64, 256):
        rng = np.random.default_rng(n)
        q, k, v = (rng.standard_normal((n, HEAD_SIZE)).astype(np.float32) for _ in range(3))
        scores = torch.from_numpy(q).double() @ torch.from_numpy(k).double().T / HEAD_SIZE**0.5
        exact = torch.softmax(scores, -1)
        noisy = quantum_noise_ref(exact, LEVEL)[0]
        values = torch.from_numpy(v).double()
        for what in ("softmax", "noise", f"noise, {SHOTS} shots"):
            nodes = [
                helper.make_node("MatMul", ["q", "k_scaled"], ["scores"]),
                helper.make_node("Softmax", ["scores"], ["softmax"]),
                make_node("QuantumNoise", ["softmax", "level"], ["noise"]),
                make_node("QuantumMeasure", ["noise", "seed"], [f"noise, {SHOTS} shots"], shots=SHOTS),
            ]
            nodes = [node for node in nodes if what != "softmax" or node.domain != DOMAIN]
            nodes = [node for node in nodes if what != "noise" or node.op_type != "QuantumMeasure"]
            nodes.append(helper.make_node("MatMul", [what, "v"], ["y"]))
            feeds = {"q": q, "k_scaled": np.ascontiguousarray(k.T) / np.float32(HEAD_SIZE**0.5), "v": v}
            more = {"level": np.array(LEVEL, np.float32), "seed": np.array(7, np.int64)} if what != "softmax" else {}
            output = np.zeros((n, HEAD_SIZE), np.float32)
            call = calls[what, n] = bound(nodes, feeds, output, more, threads)
            if what.endswith("shots"):
                # float32 moves edges of the distribution: a draw in a few thousand is another one's.
                want = quantum_measure_ref(noisy, 7, shots=SHOTS) @ values
                call()
                others = int((np.abs(output - want.numpy()).max(-1) > 1e-5).sum())
                if others > 2 + n * SHOTS * n * 2.0**-20:
                    raise SystemExit(f"{others} rows of attention with {what} differ from the reference")
            else:
                checked(
                    f"attention, {what}", call, output, ({"softmax": exact, "noise": noisy}[what] @ values).numpy(), 1e-5
                )
            rows.append({"attention": what, "n": n, "head_size": HEAD_SIZE})
    times = microseconds(calls, runs)
    return [row | {"p50_ms": times[row["attention"], row["n"]] / 1e3} for row in rows]


def density_table(ops: list[dict], runs: int) -> list[dict]:
    """What the reference takes for the same probabilities by a density matrix, row by row, on one thread."""
    torch.set_num_threads(1)
    rows = []
    for n in (64,):
        p = normalized(probabilities(n))
        kraus = kraus_operators("depolarizing", num_qubits(n), LEVEL)

        def by_density_matrix(p=p, kraus=kraus):
            return torch.stack([apply_kraus(density_matrix(row), kraus).diagonal(dim1=-2, dim2=-1).real for row in p])

        error = float((by_density_matrix() - quantum_noise_ref(p, LEVEL)[0]).abs().max())
        if not error <= 1e-12:
            raise SystemExit(f"density matrices differ from the closed form by {error:.3g}")
        (ours,) = (row["p50_us"] for row in ops if (row["op"], row["what"], row["n"]) == ("QuantumNoise", "z", n))
        took = microseconds({"density": by_density_matrix}, runs)["density"]
        rows.append({"n": n, "qubits": num_qubits(n), "rows": ROWS, "p50_ms": took / 1e3, "x_closed_form": took / ours})
    return rows


def package_table(threads: int) -> list[dict]:
    """Every package and the op take turns on the same rows. The op calls itself 100 times in its turn, and is as warm as the
    others are after a thousandth of theirs."""
    rows = []
    for n, count, rounds in ((64, ROWS, 15), (1024, 4, 5)):
        p = probabilities(n)[:count]
        exact = normalized(p)
        want = quantum_noise_ref(exact, LEVEL)[0].numpy()
        output = np.zeros_like(p)
        op = bound(
            [make_node("QuantumNoise", ["p", "level"], ["y"])],
            {"p": p, "level": np.array(LEVEL, np.float32)},
            output,
            {},
            threads,
        )
        errors = {"QuantumNoise": checked("QuantumNoise", op, output, want)}
        calls = {name: make(exact.numpy(), LEVEL) for name, make in noise_packages.PACKAGES.items()}
        for name, call in calls.items():
            errors[name] = float(np.abs(call() - want).max())
            if not errors[name] <= LARGEST_ERROR:
                raise SystemExit(f"{name} differs from the closed form by {errors[name]:.3g}")

        def hundred(op=op):
            for _ in range(100):
                op()

        times = {k: float(np.median(ms)) for k, ms in interleaved({"QuantumNoise": hundred, **calls}, rounds).items()}
        times["QuantumNoise"] /= 100
        for name, error in errors.items():
            row = {"package": name, "rows": count, "n": n, "qubits": num_qubits(n), "error": error}
            rows.append(row | {"p50_ms": times[name], "x_closed_form": times[name] / times["QuantumNoise"]})
    return rows


def main():
    arguments = common.parser(__doc__.split("\n")[0], runs=2000).parse_args()
    tables = {"ops": op_table(arguments.threads, arguments.runs)}
    tables["attention"] = attention_table(arguments.threads, arguments.runs)
    tables["density"] = density_table(tables["ops"], 5)
    tables["packages"] = package_table(arguments.threads)
    tables["kraus"] = kraus_table(bound, probabilities, arguments.threads, 24)
    tables["goals"] = goals.judged(tables, _core.isa(), file="noise")
    parameters = {"channel": "depolarizing", "level": LEVEL, "shots": SHOTS, "runs": arguments.runs}
    common.report("noise", arguments.threads, parameters, tables, arguments.json)


if __name__ == "__main__":
    main()
