"""One step of decoding over a long cache: QuantumAttention against onnxruntime's own operators, side by side.

    python -m bench.decode [--threads 1 2] [--past 16384] [--heads 8] [--kv-heads 8] [--head-size 64] [--json FILE]

Everything runs as a one-node model in the same process, with inputs and outputs bound, so that nothing is copied but what
the operator copies itself. A step of a model reads one cache per layer: the calls go round `--layers` caches, so that no
cache is still in the processor's from the step before. Outputs are first compared with a float64 computation; nothing is
timed that fails. Rounds are interleaved; the table shows medians, the bytes of the cache that a step must read over that
time, and the median over the rounds of MultiHeadAttention and GroupQueryAttention (com.microsoft) / contender.

MultiHeadAttention takes the past and returns past and new key joined, which copies. GroupQueryAttention has its past and
present bound to the same memory. QuantumAttention reads static buffers with nonpad_kv_seqlen (`static`), or a past without
asking for the present (`past`). `tree` reads a summary of the cache, bound in place, and as many keys as it says; its error
depends on the data and is shown, not limited: over the heads of all caches, the mean and the worst. Gaussian caches are the
hardest case; --activations takes those of a trained model.
"""

import argparse
import time

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from bench import common
from qexport import _core
from qexport.ops.key_summary import key_summary_shape
from qexport.ops.proto import make_node
from qexport.runtime import get_library_path

MAX_ERROR = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 2e-2}
ELEMENTS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
FIXED = {"seqlens_k": TensorProto.INT32, "total_len": TensorProto.INT32, "nonpad": TensorProto.INT64}
FIXED |= {"summary": TensorProto.FLOAT, "present_summary": TensorProto.FLOAT}


def reference(q, k, v):
    """Exact attention of one query per head in float64: q (heads, d), k and v (kv_heads, n, d)."""
    group = len(q) // len(k)
    out = np.empty(q.shape)
    for h, query in enumerate(q.astype(np.float64)):
        s = k[h // group].astype(np.float64) @ query / np.sqrt(q.shape[-1])
        p = np.exp(s - s.max())
        out[h] = p / p.sum() @ v[h // group].astype(np.float64)
    return out


class Cache:
    """The keys and values of one layer (kv_heads, n, d), the last of them being new, and queries (heads, queries, d) for
    them, in the forms that the contenders take."""

    def __init__(self, q, k, v):
        self.k, self.v = k[None], v[None]
        self.queries = [np.ascontiguousarray(q[None, :, i : i + 1]) for i in range(q.shape[1])]
        self.q = self.queries[0]
        self.expected = [reference(query[0, :, 0], k, v) for query in self.queries]

    def feeds(self, form, dtype):
        past, new = np.s_[:, :, :-1], np.s_[:, :, -1:]
        n = self.k.shape[2]
        feeds = {"q": self.q, "k": self.k[new], "v": self.v[new]}
        if form in ("static", "tree"):
            feeds = {"q": self.q, "k": self.k, "v": self.v, "nonpad": np.array([n])}
            if form == "tree":
                feeds["summary"] = np.zeros(key_summary_shape(*self.k.shape, self.v.shape[-1]), np.float32)
            return _values(feeds, dtype)
        if form in ("mha", "gqa"):
            feeds = {name: x.reshape(1, 1, -1) for name, x in feeds.items()}
        if form == "gqa":
            feeds |= {"past_key": self.k, "past_value": self.v}
            return _values(feeds | {"seqlens_k": np.array([n - 1], np.int32), "total_len": np.array([n], np.int32)}, dtype)
        return _values(feeds | {"past_key": self.k[past], "past_value": self.v[past]}, dtype)


def _values(feeds, dtype):
    def value(name, x):
        if x.dtype != np.float32 or name == "summary" or dtype == "float32":
            return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x).copy())
        if dtype == "float16":
            return ort.OrtValue.ortvalue_from_numpy(x.astype(np.float16))
        import ml_dtypes

        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            x.astype(ml_dtypes.bfloat16).view(np.uint16), TensorProto.BFLOAT16
        )

    return {name: value(name, x) for name, x in feeds.items()}


def contenders(args):
    """name -> (node, form of the cache, type)."""
    heads = {"num_heads": args.heads}
    grouped = {**heads, "kv_num_heads": args.kv_heads}
    past, present = ["past_key", "past_value"], ["present_key", "present_value"]
    found = {}
    if args.heads == args.kv_heads:
        found["MultiHeadAttention"] = (
            helper.make_node(
                "MultiHeadAttention", ["q", "k", "v", "", "", "", *past], ["y", *present], domain="com.microsoft", **heads
            ),
            "mha",
            "float32",
        )
    found["GroupQueryAttention"] = (
        helper.make_node(
            "GroupQueryAttention",
            ["q", "k", "v", *past, "seqlens_k", "total_len"],
            ["y", *present],
            domain="com.microsoft",
            **grouped,
        ),
        "gqa",
        "float32",
    )
    exact = {"strategy": "exact"}
    static = make_node("QuantumAttention", ["q", "k", "v", "", "", "", "nonpad"], ["y"], **exact)
    found["exact, static"] = (static, "static", "float32")
    found["exact, past"] = (make_node("QuantumAttention", ["q", "k", "v", "", *past], ["y"], **exact), "past", "float32")
    found["exact, static float16"] = (static, "static", "float16")
    found["exact, static bfloat16"] = (static, "static", "bfloat16")
    for samples in args.samples:
        names = ["q", "k", "v", "", "", "", "nonpad", "", "summary"]
        outputs = ["y", "", "", "", "", "present_summary"]
        node = make_node("QuantumAttention", names, outputs, strategy="tree", num_samples=samples)
        found[f"tree, {samples} keys"] = (node, "tree", "float32")
        found[f"tree, {samples} keys, bfloat16"] = (node, "tree", "bfloat16")
    return found


def session(node, feeds, dtype, threads):
    types = [(name, FIXED.get(name, ELEMENTS[dtype])) for name in (*node.input, *node.output) if name]
    inputs = [helper.make_tensor_value_info(name, element, None) for name, element in types if name in feeds]
    outputs = [helper.make_tensor_value_info(name, element, None) for name, element in types if name in node.output]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("com.qexport", 1)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # The idle threads of one contender must not spin while another is timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(get_library_path())
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def bind(sess, node, form, feeds):
    """The call on one cache, and a function that gives its output."""
    binding = sess.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, value)
    for name in filter(None, node.output):
        if form == "gqa" and name != "y":
            binding.bind_ortvalue_output(name, feeds[name.replace("present", "past")])
        elif name == "present_summary":
            binding.bind_ortvalue_output(name, feeds["summary"])
        else:
            binding.bind_output(name, "cpu")

    def output(query):
        """Of another query; what is bound stays."""
        binding.bind_ortvalue_input("q", query)
        sess.run_with_iobinding(binding)
        binding.bind_ortvalue_input("q", feeds["q"])
        y = binding.get_outputs()[0]
        y = y.numpy() if y.element_type() != TensorProto.BFLOAT16 else _bfloat16(y)
        return y.astype(np.float64)

    return lambda: sess.run_with_iobinding(binding), output


def _bfloat16(value):
    import torch

    return torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack()).float().numpy()


def layers(args):
    """The caches: sites of a file of activations, or Gaussian ones."""
    if args.activations:
        arrays = np.load(args.activations)
        q, k, v = (arrays[name][: args.layers] for name in "qkv")
        return [Cache(*site) for site in zip(q[:, :, -args.queries :], k, v, strict=True)]
    caches = []
    for seed in range(args.layers):
        rng = np.random.default_rng(seed)
        rows = (args.heads, args.queries), (args.kv_heads, args.past + 1), (args.kv_heads, args.past + 1)
        caches.append(Cache(*(rng.standard_normal((*row, args.head_size), dtype=np.float32) for row in rows)))
    return caches


def head_errors(cache, form, dtype, output):
    """Relative errors of the heads over all queries of a cache; the head axis alone is left."""
    squares = []
    for query, expected in zip(cache.queries, cache.expected, strict=True):
        y = output(_values({"q": query.reshape(1, 1, -1) if form in ("mha", "gqa") else query}, dtype)["q"])
        squares.append([((y.reshape(expected.shape) - expected) ** 2).sum(1), (expected**2).sum(1)])
    wrong, whole = np.sum(squares, 0)
    return np.sqrt(wrong / whole)


def measure(args, caches, threads, clock):
    """name -> times in milliseconds, one per round, of the contenders whose outputs are right."""
    calls, errors, sizes = {}, {}, {}
    for name, (node, form, dtype) in contenders(args).items():
        sess, calls[name], errors[name] = None, [], []
        for cache in caches:
            feeds = cache.feeds(form, dtype)
            sess = sess or session(node, feeds, dtype, threads)
            call, output = bind(sess, node, form, feeds)
            calls[name].append(call)
            errors[name].append(head_errors(cache, form, dtype, output))
        if form != "tree" and not np.max(errors[name]) <= MAX_ERROR[dtype]:
            raise SystemExit(f"{name}: relative error {np.max(errors[name]):.2e} is above {MAX_ERROR[dtype]}; not timed")
        sizes[name] = 2 * caches[0].k.size * (4 if dtype == "float32" else 2)
    times = {name: [] for name in calls}
    end = time.perf_counter() + args.seconds
    rounds = 0
    while time.perf_counter() < end or rounds < 3 * args.layers:
        for name, layers in calls.items():
            start = clock()
            layers[rounds % args.layers]()
            times[name].append((clock() - start) * 1e3)
        rounds += 1
    return {name: np.array(t) for name, t in times.items()}, errors, sizes


def table(args, clock):
    rows, caches = [], layers(args)
    args.kv_heads, args.heads = caches[0].k.shape[1], caches[0].q.shape[1]
    for threads in args.threads:
        times, errors, sizes = measure(args, caches, threads, clock)
        for name, t in times.items():
            row = {"step": name, "threads": threads, "ms": float(np.median(t)), "mb": sizes[name] / 1e6}
            row["gb_per_s"] = row["mb"] / row["ms"]
            for short, other in (("mha", "MultiHeadAttention"), ("gqa", "GroupQueryAttention")):
                row[f"{short}_ratio"] = float(np.median(times[other] / t)) if other in times else None
            row |= {"error": float(np.mean(errors[name])), "worst_head": float(np.max(errors[name])), "rounds": len(t)}
            rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--past", type=int, default=16384, help="keys in the cache before the step")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3, help="caches that the calls go round")
    parser.add_argument("--samples", type=int, nargs="+", default=[256, 512], help="num_samples of tree")
    parser.add_argument("--queries", type=int, default=8, help="that errors are taken over")
    parser.add_argument("--activations", metavar="NPZ", help="of bench.activations, in place of Gaussian caches")
    parser.add_argument("--seconds", type=float, default=6.0, help="per number of threads")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of the calling thread, for a shared machine; one thread"
    )
    args = parser.parse_args()
    if args.cpu_time and args.threads != [1]:
        parser.error("--cpu-time sees the calling thread alone: give --threads 1")
    clock = time.thread_time if args.cpu_time else time.perf_counter
    tables = {"decode": table(args, clock)}
    names = ("activations",) if args.activations else ("past", "heads", "kv_heads", "head_size")
    parameters = {name: getattr(args, name) for name in (*names, "layers", "queries")}
    common.report(
        "decode",
        max(args.threads),
        parameters | {"isa": _core.isa(), "clock": "processor time of the thread" if args.cpu_time else "wall clock"},
        tables,
        args.json,
    )


if __name__ == "__main__":
    main()
