"""Time of one new token over a long past: caches that are copied at every step, and caches that stay in place."""

import ml_dtypes
import numpy as np

from bench import activations, common
from bench.attention import prefill
from qexport.ops.key_summary import chunks, key_summary_shape
from qexport.profiling.timing import interleaved
from qexport.scaling import nodes, reference

HEADS, GROUP, SIZE = 8, 4, 64  # GROUP: query heads of a kv head where heads are grouped
DENSITIES = (64, 32, 16, 8)
TOLERANCE, BUDGET = 0.1, 256  # keys that a step with a tolerance reads at first
STEPS = 32
ROOM = 128  # entries of a static cache that are not used yet
# Largest relative error that is timed. The mean of many random values is small beside what is added up for it, and so is the
# number of its digits that are right; 16-bit caches hold other numbers than the reference; tree estimates.
LIMITS = {"bf16 cache": 0.02, "fp16 cache": 0.003}
# Steps that tell their error.
CERTIFIED = {
    f"tree, {BUDGET} keys": {},
    f"tree, {BUDGET} keys, james_stein": {"residual": "james_stein"},
    f"tree, tolerance {TOLERANCE}": {"error_tolerance": TOLERANCE},
    f"tree, tolerance {TOLERANCE}, james_stein": {"error_tolerance": TOLERANCE, "residual": "james_stein"},
}
CERTIFIED = {name: {"strategy": "tree", "num_samples": [BUDGET]} | more for name, more in CERTIFIED.items()}
RIVALS = {"x_mha": "MultiHeadAttention, past", "x_gqa": "GroupQueryAttention, shared buffer"}
RIVALS |= {"x_attention": "Attention, static cache", "x_sdpa": "torch SDPA, static cache"}


def gaussian(past: int, kv_heads: int = HEADS):
    """q (1, HEADS, 1, SIZE) of the last and k, v (1, kv_heads, n, SIZE) of all of n = `past` + 1 positions."""
    k, v = np.random.default_rng(past).standard_normal((2, 1, kv_heads, past + 1, SIZE), dtype=np.float32)
    return np.random.default_rng(0).standard_normal((1, HEADS, 1, SIZE), dtype=np.float32), k, v


def stories(past: int):
    """The same of a middle layer of stories15M (6 heads of 48), stretched to `past` + 1 positions."""
    q, k, v = activations.stories15m(past + 1)
    return tuple(np.ascontiguousarray(x[3:4]) for x in (q[:, :, -1:], k, v))


def contenders(q, k, v, threads: int) -> dict[str, nodes.Contender]:
    """Attention of the last query to all of k and v, by way of a past or of a cache with room to grow."""
    past, total = k.shape[2] - 1, k.shape[2]
    new_k, new_v = k[:, :, past:], v[:, :, past:]
    valid = {"nonpad_kv_seqlen": np.array([total], dtype=np.int64)}

    # Everyone has its own cache, so that nobody finds it in the processor's because another has just read it.
    def before():
        return {"past_key": k[:, :, :past].copy(), "past_value": v[:, :, :past].copy()}

    def caches():
        return [np.pad(x, [(0, 0), (0, 0), (0, ROOM), (0, 0)]) for x in (k, v)]

    def narrow(dtype):
        return [x.astype(dtype) for x in (q, *caches())]

    def static(arrays, more=None, **attributes):
        return nodes.quantum(*arrays, threads, flat=False, extra=valid | (more or {}), **attributes)

    def summarised(arrays, **attributes):
        shape = key_summary_shape(*arrays[1].shape, v.shape[-1])
        return static(arrays, {"key_summary": np.zeros(shape, np.float32)}, **attributes)

    def tree(arrays, density):
        return summarised(arrays, strategy="tree", num_samples=[max(1, total // density)])

    found = {
        "exact fp32, past": nodes.quantum(q, new_k, new_v, threads, extra=before(), strategy="exact"),
        "exact fp32, past only": nodes.quantum(q, new_k, new_v, threads, extra=before(), present=False, strategy="exact"),
        "exact fp32, static cache": static([q, *caches()], strategy="exact"),
        "exact, bf16 cache": static(narrow(ml_dtypes.bfloat16), strategy="exact"),
        "exact, fp16 cache": static(narrow(np.float16), strategy="exact"),
    }
    if chunks(total):
        found |= {f"tree 1/{density}, static cache": tree([q, *caches()], density) for density in DENSITIES}
        found["tree 1/16, bf16 cache"] = tree(narrow(ml_dtypes.bfloat16), 16)
        for name, attributes in CERTIFIED.items():
            found[f"{name}, static cache"] = summarised([q, *caches()], estimate=True, **attributes)
    if k.shape[1] == q.shape[1]:  # it has no grouped heads
        found["MultiHeadAttention, past"] = nodes.multi_head_attention(q, new_k, new_v, threads, past=before())
    found["Attention, past"] = nodes.onnx_attention(q, new_k, new_v, threads, past=before())
    found["Attention, static cache"] = nodes.onnx_attention(q, *caches(), threads, **valid)
    found["GroupQueryAttention, shared buffer"] = nodes.group_query_attention(q, *caches(), threads, past_len=past)
    found["torch SDPA, static cache"] = nodes.torch_sdpa(q, *(x[:, :, :total] for x in caches()), threads)
    return found


def table(pasts, threads, seconds: float, least: int, peaks: dict, clock, more: tuple[int, ...] = ()) -> list[dict]:
    """One row per number of threads, data, past and contender; `more`: pasts that are also measured on trained activations
    and with grouped heads.

    `percent_of_bandwidth` counts each byte of the cache once; caches that fit the processor's own can exceed 100.
    """
    inputs = [("gaussian", past, gaussian(past)) for past in pasts]
    inputs += [("grouped", past, gaussian(past, HEADS // GROUP)) for past in more]
    inputs += [("stories", past, stories(past)) for past in more]
    return [
        row
        for count in threads
        for name, past, (q, k, v) in inputs
        for row in _rows(name, past, q, k, v, count, seconds, least, peaks, clock)
    ]


def _rows(data, past, q, k, v, threads, seconds, least, peaks, clock) -> list[dict]:
    found = contenders(q, k, v, threads)
    expected = reference.attention(q, *(x.repeat(q.shape[1] // k.shape[1], 1) for x in (k, v)), np.array([0]), False)
    errors = {}
    for name, contender in found.items():
        contender.call()
        errors[name] = reference.head_errors(contender.output(), expected)
        limit = LIMITS.get(name.partition(", ")[2], 1e-4)
        if not name.startswith("tree") and not common.relative_error(contender.output(), expected) <= limit:
            raise SystemExit(f"{name}, past {past}: relative error {errors[name].max():.2e} is above {limit}; not timed")
    times = interleaved({name: c.call for name, c in found.items()}, least, seconds, clock=clock)
    rows = []
    for name, ms in times.items():
        low, median, high = (float(x) for x in np.percentile(ms, [25, 50, 75]))
        row = {"data": data, "past": past, "heads": q.shape[1], "kv_heads": k.shape[1], "threads": threads}
        row |= {"contender": name, "ms": median, "ms_p25": low, "ms_p75": high, "rounds": len(ms)}
        size = (k.nbytes + v.nbytes) / (2 if "16 cache" in name else 1)
        bandwidth = peaks.get(f"read_gb_per_s {threads}")
        row["percent_of_bandwidth"] = 100e-6 * size / median / bandwidth if bandwidth else None
        row |= prefill.compared(times, name, RIVALS)
        row |= {"error_mean": float(errors[name].mean()), "error_worst": float(errors[name].max())}
        row["estimate_mean"] = float(found[name].estimate().mean()) if found[name].estimate else None
        rows.append(row)
    return rows


def certificate(names, threads: int) -> list[dict]:
    """How what CERTIFIED steps say of their error compares with it, over STEPS steps of every head at the end of a text.

    A row is one head in one step. `within_1_5` and `rows_within_1_5`: the share whose estimate is within a factor of 1.5
    of the error, for the root mean square of a head over the steps and for single rows, `exact` ones left out.
    `rows_below`: of these, the share whose error is at most the estimate. `kept`: rows whose error is within the tolerance.
    """
    found = []
    for name in names:
        q, k, v = activations.activations(name)
        n = k.shape[2]
        queries, places = np.ascontiguousarray(q[:, :, n - 2 * STEPS :: 2]), np.arange(n - 2 * STEPS, n, 2)
        expected = reference.attention(q, k, v, places, False)
        norms = np.linalg.norm(expected, axis=-1)
        for contender, attributes in CERTIFIED.items():
            errors, estimates = np.empty((2, *norms.shape))
            for site in range(len(k)):
                step = queries[site : site + 1, :, :1].copy()
                seed = np.zeros((), np.int64)
                extra = {"nonpad_kv_seqlen": np.array([n], dtype=np.int64), "seed": seed}
                shape = key_summary_shape(1, *k.shape[1:], v.shape[-1])
                extra["key_summary"] = np.zeros(shape, np.float32)
                arrays = step, k[site : site + 1], v[site : site + 1]
                run = nodes.quantum(*arrays, threads, flat=False, extra=extra, estimate=True, layer=site, **attributes)
                for i in range(STEPS):
                    step[:], seed[...] = queries[site : site + 1, :, i : i + 1], i
                    run.call()
                    y = run.output()[0, :, 0]
                    errors[site, :, i] = np.linalg.norm(y - expected[site, :, i], axis=-1)
                    estimates[site, :, i] = run.estimate()[0] * np.linalg.norm(y, axis=-1)
            found.append({"data": name, "contender": contender} | _compared(errors, estimates, norms, attributes))
    return found


def _compared(errors, estimates, norms, attributes) -> dict:
    """From errors, their estimates and the norms of what is right, (sites, heads, steps) each."""
    whole, wrong, said = (np.sqrt((x**2).sum(-1)) for x in (norms, errors, estimates))
    drawn, sampled = estimates > 0, said > 0

    def close(said, true):
        ratio = said / true
        return float(np.mean((ratio <= 1.5) & (ratio >= 1 / 1.5))) if ratio.size else None

    tolerance = attributes.get("error_tolerance")
    row = {"heads": wrong.size, "error_mean": float((wrong / whole).mean()), "error_worst": float((wrong / whole).max())}
    row |= {"estimate_mean": float((said / whole).mean()), "estimate_worst": float((said / whole).max())}
    row |= {"exact": float(np.mean(~drawn)), "within_1_5": close(said[sampled], wrong[sampled])}
    row["rows_within_1_5"] = close(estimates[drawn], errors[drawn])
    row["rows_below"] = float(np.mean(estimates[drawn] >= errors[drawn])) if drawn.any() else None
    row["kept"] = float(np.mean(errors <= tolerance * norms)) if tolerance else None
    return row
