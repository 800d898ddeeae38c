"""Time of one new token over a long past: caches that are copied at every step, and caches that stay in place."""

import ml_dtypes
import numpy as np

from bench import activations, common
from bench.attention import nodes, prefill, reference
from qexport.ops.key_summary import chunks, key_summary_shape

HEADS, GROUP, SIZE = 8, 4, 64  # GROUP: query heads of a kv head where heads are grouped
DENSITIES = (64, 32, 16, 8)
ROOM = 128  # entries of a static cache that are not used yet
# Largest relative error that is timed. The mean of many random values is small beside what is added up for it, and so is the
# number of its digits that are right; 16-bit caches hold other numbers than the reference; tree estimates.
LIMITS = {"bf16 cache": 0.02, "fp16 cache": 0.003}
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

    def tree(arrays, density):
        shape = key_summary_shape(*arrays[1].shape, v.shape[-1])
        summary = {"key_summary": np.zeros(shape, np.float32)}
        return static(arrays, summary, strategy="tree", num_samples=[max(1, total // density)])

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
    times = common.interleaved({name: c.call for name, c in found.items()}, least, seconds, clock=clock)
    rows = []
    for name, ms in times.items():
        low, median, high = (float(x) for x in np.percentile(ms, [25, 50, 75]))
        row = {"data": data, "past": past, "heads": q.shape[1], "kv_heads": k.shape[1], "threads": threads}
        row |= {"contender": name, "ms": median, "ms_p25": low, "ms_p75": high, "rounds": len(ms)}
        size = (k.nbytes + v.nbytes) / (2 if "16 cache" in name else 1)
        bandwidth = peaks.get(f"read_gb_per_s {threads}")
        row["percent_of_bandwidth"] = 100e-6 * size / median / bandwidth if bandwidth else None
        row |= prefill.compared(times, name, RIVALS)
        rows.append(row | {"error_mean": float(errors[name].mean()), "error_worst": float(errors[name].max())})
    return rows
