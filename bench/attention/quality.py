"""Error and time together: every estimator on the activations of trained models; and errors on Gaussian inputs."""

import numpy as np

from bench import activations
from bench.attention import prefill
from qexport.profiling.timing import interleaved
from qexport.recipe import defaults
from qexport.scaling import baselines, nodes, reference

DENSITIES = (32, 16, 8, 4, 2)  # n over the number of keys that `tree` reads exactly
TOLERANCE = 0.1
SLOW_FROM = 2049  # queries; what computes all scores in torch is left out there
RIVALS = {"x_mha": "MultiHeadAttention", "x_sdpa": "torch SDPA", "x_own_bf16": "exact bf16"}


def tree(q, k, v, threads, causal, density, **attributes) -> nodes.Contender:
    attributes = {"precision": "auto"} | attributes
    samples = [max(1, q.shape[2] // density)]
    return nodes.quantum(q, k, v, threads, causal=causal, strategy="tree", num_samples=samples, **attributes)


def ours(q, k, v, threads: int, causal: bool) -> dict[str, nodes.Contender]:
    common_part = (q, k, v, threads)
    found = {f"exact {p}": nodes.quantum(*common_part, causal=causal, strategy="exact", precision=p) for p in prefill.LIMITS}
    found["default"] = nodes.quantum(*common_part, causal=causal, **defaults({}))
    found |= {f"tree 1/{density}": tree(*common_part, causal, density) for density in DENSITIES}
    found["tree 1/8, fp32"] = tree(*common_part, causal, 8, precision="fp32")
    for residual in ("unbiased", "james_stein"):
        found[f"tree 1/8, {residual}"] = tree(*common_part, causal, 8, residual=residual)
    found[f"tree, tolerance {TOLERANCE}"] = tree(*common_part, causal, DENSITIES[0], error_tolerance=TOLERANCE)
    if q.shape[2] < SLOW_FROM:
        for samples in (32, 64):
            found[f"stratified {samples}"] = nodes.quantum(
                *common_part, causal=causal, strategy="stratified", num_samples=[samples]
            )
    return found


def others(q, k, v, threads: int, causal: bool) -> dict[str, nodes.Contender]:
    """onnxruntime and torch, exact, and the approximations of `baselines`."""
    _, heads, n, size = q.shape
    found = {
        "MultiHeadAttention": nodes.multi_head_attention(q, k, v, threads, causal=causal),
        "torch SDPA": nodes.torch_sdpa(q, k, v, threads, causal=causal),
    }
    functions = {"Performer": baselines.performer(None, size, causal)}
    if not causal:
        functions |= {f"Linformer {length}": baselines.linformer(length, n, heads, size) for length in (64, 256)}
        functions |= {f"uniform 1/{density}": baselines.uniform(n // density) for density in (8, 2)}
    if n < SLOW_FROM:
        functions["top 64"] = baselines.top_k(64, False, causal)
        functions |= {f"top {count} and mean V": baselines.top_k(count, True, causal) for count in (64, n // 8)}
    return found | {name: nodes.torch_call(function, q, k, v, threads) for name, function in functions.items()}


def inputs(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v of a set of `bench.activations`; of minilm-16384 six heads of the middle layer."""
    if name == "minilm-16384":
        return tuple(np.ascontiguousarray(x[3:4, :6]) for x in activations.minilm(16384))
    return activations.activations(name)


def table(names, threads: int, seconds: float, least: int, clock) -> list[dict]:
    """One row per set of `bench.activations` and contender: error over all its heads, time of all of them in one call."""
    return [row for name in names for row in _rows(name, *inputs(name), threads, seconds, least, clock)]


def _rows(name, q, k, v, threads, seconds, least, clock) -> list[dict]:
    causal = name in activations.CAUSAL
    found = ours(q, k, v, threads, causal) | others(q, k, v, threads, causal)
    places = reference.rows_of(q.shape[2])
    expected = reference.attention(q, k, v, places, causal)
    errors = {}
    for contender, run in found.items():
        run.call()
        errors[contender] = reference.head_errors(run.output()[:, :, places], expected)
        limit = prefill.LIMITS.get(contender.removeprefix("exact "), None)
        if limit is not None and not errors[contender].mean() <= limit:
            raise SystemExit(f"{contender} on {name}: mean error {errors[contender].mean():.2e} is above {limit}; not timed")
    times = interleaved({key: c.call for key, c in found.items()}, least, seconds, warmup=0, clock=clock)
    rows = []
    for contender, ms in times.items():
        low, median, high = (float(x) for x in np.percentile(ms, [25, 50, 75]))
        error = errors[contender]
        row = {"data": name, "n": q.shape[2], "heads": error.size, "causal": causal, "threads": threads}
        row |= {"contender": contender, "error_mean": float(error.mean()), "error_worst": float(error.max())}
        row |= {"ms": median, "ms_p25": low, "ms_p75": high} | prefill.compared(times, contender, RIVALS)
        rows.append(row)
    return rows


def certificate(names, threads: int) -> list[dict]:
    """How `error_estimate` and `error_tolerance` of `tree` compare with the error that was really made, head by head.

    `exact`: heads that the op computed exactly, up to the precision; they have nothing to estimate. Of the others,
    `within_1_5`: heads whose estimate is within a factor of 1.5 of the truth, and `below`: heads whose truth is at most the
    estimate; None where there are none. `kept`: heads whose error is within the tolerance, where one was asked for.
    """
    rows = []
    for name in names:
        q, k, v = inputs(name)
        causal = name in activations.CAUSAL
        places = reference.rows_of(q.shape[2])
        expected = reference.attention(q, k, v, places, causal)
        for density, tolerance in ((16, 0.0), (8, 0.0), (32, TOLERANCE), (32, 2 * TOLERANCE)):
            run = tree(q, k, v, threads, causal, density, estimate=True, error_tolerance=tolerance)
            run.call()
            error = reference.head_errors(run.output()[:, :, places], expected).ravel()
            estimate = run.estimate().ravel()
            row = {"data": name, "density": f"1/{density}", "tolerance": tolerance, "heads": error.size}
            row |= {"error_mean": float(error.mean()), "error_worst": float(error.max())}
            row |= {"estimate_mean": float(estimate.mean()), "estimate_worst": float(estimate.max())}
            row["exact"] = float(np.mean(estimate == 0))
            ratio = estimate[estimate > 0] / error[estimate > 0]
            row["within_1_5"] = float(np.mean((ratio <= 1.5) & (ratio >= 1 / 1.5))) if ratio.size else None
            row["below"] = float(np.mean(ratio >= 1)) if ratio.size else None
            row["kept"] = float(np.mean(error <= tolerance)) if tolerance else None
            rows.append(row)
    return rows


def gaussian(lengths, threads: int) -> list[dict]:
    """Errors on N(0, 1) inputs beside `bound`, what nobody can beat who reads that many values of single keys."""
    rows = []
    for n in lengths:
        q, k, v = np.random.default_rng(n).standard_normal((3, 1, 4, n, 64), dtype=np.float32)
        places = reference.rows_of(n)
        expected = reference.attention(q, k, v, places, False)
        for share in (32, 8, 2):
            samples = n // share
            attributes = {"num_samples": [samples]}
            found = {s: nodes.quantum(q, k, v, threads, strategy=s, **attributes) for s in ("stratified", "tree")}
            functions = {"top k": baselines.top_k(samples, False), "top k and mean V": baselines.top_k(samples, True)}
            functions["uniform"] = baselines.uniform(samples)
            found |= {name: nodes.torch_call(function, q, k, v, threads) for name, function in functions.items()}
            for name, run in found.items():
                run.call()
                error = reference.head_errors(run.output()[:, :, places], expected)
                row = {"n": n, "samples": samples, "estimator": name, "error_mean": float(error.mean())}
                rows.append(row | {"error_worst": float(error.max()), "bound": reference.gaussian_bound(samples, n)})
    return rows
