"""Exact attention on the CPU: QuantumAttention (strategy exact) against onnxruntime's own operators, side by side.

    python -m bench.exact_attention [--precision bf16] [--threads 1 2] [--lengths 32 512] [--head-sizes 64 32] [--json FILE]

Everything runs as a one-node model in the same process. Each output is first compared with a float64 computation; nothing
is timed that fails. The rounds are interleaved (one call of each contender in turn), the tables show medians, and a ratio is
the median over the rounds of contender / QuantumAttention with its quartiles, so above 1 QuantumAttention is faster. The
3-D form is compared with com.microsoft MultiHeadAttention (`mha`), the 4-D form with ai.onnx Attention of opset 23.
"""

import argparse
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from bench import common
from qexport import _core
from qexport.ops.proto import make_node
from qexport.runtime import get_library_path

HEADS = 8
# Relative Frobenius error against float64, inputs N(0, 1).
MAX_ERROR = {"fp32": 1e-5, "bf16": 0.005, "int8": 0.015}


def reference(q, k, v, causal):
    """softmax(q k^T / sqrt(d)) v in float64; (heads, n, d)."""
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v.astype(np.float64)


def contenders(heads, causal, precision):
    """name -> (node, opset imports, 3-D inputs?)."""
    unmasked = {"unidirectional": 1} if causal else {}
    own = {"strategy": "exact", "is_causal": int(causal), "precision": precision}
    names = ["q", "k", "v"]
    return {
        "QuantumAttention 3-D": (
            make_node("QuantumAttention", names, ["y"], q_num_heads=heads, kv_num_heads=heads, **own),
            [helper.make_opsetid("", 23), helper.make_opsetid("com.qexport", 1)],
            True,
        ),
        "MultiHeadAttention": (
            helper.make_node("MultiHeadAttention", names, ["y"], domain="com.microsoft", num_heads=heads, **unmasked),
            [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)],
            True,
        ),
        "QuantumAttention 4-D": (
            make_node("QuantumAttention", names, ["y"], **own),
            [helper.make_opsetid("", 23), helper.make_opsetid("com.qexport", 1)],
            False,
        ),
        "Attention-23": (
            helper.make_node("Attention", names, ["y"], is_causal=int(causal)),
            [helper.make_opsetid("", 23)],
            False,
        ),
    }


def session(node, opsets, rank, threads):
    """An onnxruntime session of a model that is that one node."""
    shape = ["b", "n", "s"] if rank == 3 else ["b", "h", "n", "s"]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("q", "k", "v")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(helper.make_graph([node], "g", values, [output]), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # The idle threads of one contender must not spin while another is timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(get_library_path())
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def bind(sess, feeds):
    """The session's call with inputs and outputs bound, so that no copy is timed."""
    binding = sess.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("y", "cpu")
    return lambda: sess.run_with_iobinding(binding), lambda: binding.copy_outputs_to_cpu()[0]


def measure(heads, n, size, threads, causal, precision, seconds, clock):
    """One row of the table: checked outputs, then interleaved times of every contender in milliseconds."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, n, size), dtype=np.float32) for _ in range(3))
    expected = reference(q[0], k[0], v[0], causal)
    calls, errors = {}, {}
    for name, (node, opsets, flat) in contenders(heads, causal, precision).items():
        arrays = {"q": q, "k": k, "v": v}
        if flat:
            arrays = {key: np.ascontiguousarray(a.transpose(0, 2, 1, 3).reshape(1, n, -1)) for key, a in arrays.items()}
        call, output = bind(session(node, opsets, 3 if flat else 4, threads), arrays)
        call()
        y = output()
        y = y.reshape(n, heads, size).transpose(1, 0, 2) if flat else y[0]
        errors[name] = float(np.linalg.norm(y - expected) / np.linalg.norm(expected))
        limit = MAX_ERROR[precision if name.startswith("Quantum") else "fp32"]
        if not errors[name] <= limit:
            raise SystemExit(f"{name}, n={n}, head_size={size}: error {errors[name]:.2e} is above {limit}; not timed")
        calls[name] = call
    times = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["Attention-23"]) < 5:
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append((clock() - start) * 1e3)
    return errors, {name: np.array(t) for name, t in times.items()}


def table(args, lengths, causal: bool, clock) -> list[dict]:
    """A row per number of threads, head size and length."""
    rows = []
    for threads in args.threads:
        for size in args.head_sizes:
            for n in lengths:
                errors, times = measure(args.heads, n, size, threads, causal, args.precision, args.seconds, clock)
                medians = {name: float(np.median(t)) for name, t in times.items()}
                flop = 4 * args.heads * n * n * size / (2 if causal else 1)
                row = {
                    "n": n,
                    "head_size": size,
                    "threads": threads,
                    "ms_3d": medians["QuantumAttention 3-D"],
                    "gflop_per_s": 1e-6 * flop / medians["QuantumAttention 3-D"],
                    "ms_mha": medians["MultiHeadAttention"],
                }
                row |= ratio("mha", times["MultiHeadAttention"], times["QuantumAttention 3-D"])
                row |= {"ms_4d": medians["QuantumAttention 4-D"], "ms_attention": medians["Attention-23"]}
                row |= ratio("attention", times["Attention-23"], times["QuantumAttention 4-D"])
                rows.append(row | {"rounds": len(times["Attention-23"]), "max_error": errors["QuantumAttention 4-D"]})
    return rows


def ratio(name: str, theirs, ours) -> dict:
    """Median over the rounds of their time over ours, with its quartiles."""
    low, median, high = (float(x) for x in np.percentile(theirs / ours, [25, 50, 75]))
    return {f"{name}_ratio": median, f"{name}_p25": low, f"{name}_p75": high}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512, 2048, 4096])
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--precision", choices=MAX_ERROR, default="fp32", help="of QuantumAttention; the others use float32")
    parser.add_argument("--seconds", type=float, default=2.0, help="per row of a table")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of the calling thread, for a shared machine; one thread"
    )
    args = parser.parse_args()
    if args.cpu_time and args.threads != [1]:
        parser.error("--cpu-time sees the calling thread alone: give --threads 1")
    clock = time.thread_time if args.cpu_time else time.perf_counter
    tables = {name: table(args, args.lengths, name == "causal", clock) for name in ("full", "causal")}
    clock_name = "processor time of the thread" if args.cpu_time else "wall clock"
    parameters = {"heads": args.heads, "precision": args.precision, "isa": _core.isa(), "clock": clock_name}
    common.report("exact_attention", max(args.threads), parameters, tables, args.json)


if __name__ == "__main__":
    main()
