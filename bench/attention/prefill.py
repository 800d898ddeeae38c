"""Time of whole attentions against the length: Gaussian inputs, every contender checked and then timed in turn."""

import numpy as np

from bench import common
from qexport.profiling.timing import interleaved
from qexport.recipe import defaults
from qexport.scaling import nodes, reference

SIZE = 64  # head_size
HEADS = {128: 8, 512: 8, 1024: 8, 2048: 8, 4096: 4, 8192: 2, 16384: 1}  # by length
# Largest relative error against float64 that is still timed. `tree` has no place here: Gaussian inputs hold nothing to
# estimate from (docs/math.md), its error is measured on trained activations. `default` is what `convert` writes by itself.
LIMITS = {"fp32": 2e-5, "bf16": 0.01, "int8": 0.02}
# Attention and torch take 4-D inputs, the others merge the heads, and so do ours but for the row that says 4-D.
RIVALS = {"x_mha": "MultiHeadAttention", "x_attention": "Attention", "x_gqa": "GroupQueryAttention", "x_sdpa": "torch SDPA"}
RIVALS |= {"x_own_bf16": "exact bf16"}
DENSITY = 8  # keys per key that `tree` reads exactly


def contenders(q, k, v, threads: int, causal: bool) -> dict[str, nodes.Contender]:
    """All that computes this attention: ours first, then the rivals."""
    found = {f"exact {p}": nodes.quantum(q, k, v, threads, causal=causal, strategy="exact", precision=p) for p in LIMITS}
    found["exact fp32, 4-D"] = nodes.quantum(q, k, v, threads, causal=causal, flat=False, strategy="exact")
    samples = max(1, q.shape[2] // DENSITY)
    found[f"tree 1/{DENSITY}"] = nodes.quantum(
        q, k, v, threads, causal=causal, strategy="tree", num_samples=[samples], precision="auto"
    )
    found["default"] = nodes.quantum(q, k, v, threads, causal=causal, **defaults({}))
    found["MultiHeadAttention"] = nodes.multi_head_attention(q, k, v, threads, causal=causal)
    found["Attention"] = nodes.onnx_attention(q, k, v, threads, causal=causal)
    if causal:
        found["GroupQueryAttention"] = nodes.group_query_attention(q, k, v, threads)
    found["torch SDPA"] = nodes.torch_sdpa(q, k, v, threads, causal=causal)
    return found


def checked(found: dict[str, nodes.Contender], expected, rows) -> dict[str, float]:
    """Relative error of each contender; ends the benchmark where one is above its limit."""
    errors = {}
    for name, contender in found.items():
        contender.call()
        errors[name] = common.relative_error(contender.output()[:, :, rows], expected)
        limit = LIMITS.get(name.removeprefix("exact ")[:4], LIMITS["fp32"])
        if not name.startswith(("tree", "default")) and not errors[name] <= limit:
            raise SystemExit(f"{name}: relative error {errors[name]:.2e} is above {limit}; nothing was timed")
    return errors


def compared(times: dict[str, np.ndarray], name: str, rivals: dict[str, str]) -> dict:
    """The columns of `rivals` for contender `name`: how many times as long each rival takes; None where it did not run."""
    columns = {}
    for column, rival in rivals.items():
        if rival in times and name != rival:
            columns |= common.ratio(column, times[rival], times[name])
        else:
            columns |= {column: None, f"{column}_p25": None, f"{column}_p75": None}
    return columns


def table(lengths, threads, seconds: float, least: int, peaks: dict, clock) -> list[dict]:
    """One row per number of threads, causal or not, length and contender; `peaks` as `bench.micro` gives them."""
    rows = []
    for count in threads:
        for causal in (False, True):
            for n in lengths:
                rows += _rows(n, count, causal, seconds, least, peaks, clock)
    return rows


def _rows(n, threads, causal, seconds, least, peaks, clock) -> list[dict]:
    heads = HEADS.get(n, 1)
    q, k, v = np.random.default_rng(n).standard_normal((3, 1, heads, n, SIZE), dtype=np.float32)
    places = reference.rows_of(n, 128)
    found = contenders(q, k, v, threads, causal)
    errors = checked(found, reference.attention(q, k, v, places, causal), places)
    times = interleaved({name: c.call for name, c in found.items()}, least, seconds, warmup=0, clock=clock)
    pairs = heads * (n * (n + 1) // 2 if causal else n * n)
    rows = []
    for name, ms in times.items():
        low, median, high = (float(x) for x in np.percentile(ms, [25, 50, 75]))
        row = {"n": n, "heads": heads, "causal": causal, "threads": threads, "contender": name}
        row |= {"ms": median, "ms_p25": low, "ms_p75": high, "rounds": len(ms), "ns_per_pair": 1e6 * median / pairs}
        gflops = 1e-6 * 4 * SIZE * pairs / median
        row["percent_of_fp32_peak"] = 100 * gflops / (peaks["fp32_gflops"] * threads) if peaks else None
        rows.append(row | compared(times, name, RIVALS) | {"error": errors[name]})
    return rows
