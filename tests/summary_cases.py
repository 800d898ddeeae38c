"""Caches whose keys cluster, and steps of decoding from their key_summary."""

import ml_dtypes
import numpy as np

from qexport import _core
from qexport.ops import QUANTUM_ATTENTION
from qexport.ops.key_summary import CHUNK_KEYS, CLUSTER_KEYS, SINK_KEYS, chunks, fields, key_summary_shape

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def cache(seed, batch=1, kv_heads=2, n=2100, size=32, v_size=24, dtype="float32"):
    """Keys and values around a few centres, in any order, rounded to `dtype`."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, 24, (batch, kv_heads, n))
    k = 1.5 * rng.standard_normal((batch, kv_heads, 24, size))
    v = rng.standard_normal((batch, kv_heads, 24, v_size))
    k, v = (
        np.take_along_axis(x, topic[..., None], 2) + 0.3 * rng.standard_normal((batch, kv_heads, n, x.shape[-1]))
        for x in (k, v)
    )
    return k.astype(np.float32).astype(TYPES[dtype]), v.astype(np.float32).astype(TYPES[dtype])


def queries(seed, k, heads, rows=1):
    rng = np.random.default_rng([seed, 1])
    return (1.5 * rng.standard_normal((k.shape[0], heads, rows, k.shape[-1]))).astype(np.float32).astype(k.dtype)


def zeros(k, v):
    return np.zeros(key_summary_shape(*k.shape, v.shape[-1]), np.float32)


def run(q, k, v, nonpad, summary=None, **options):
    """(Y, present_key_summary)."""
    return step(q, k, v, nonpad, summary, **options)[::2]


def step(q, k, v, nonpad, summary=None, *, threads=1, seed=0, mask=None, error_estimate=False, **change):
    """(Y, error_estimate, present_key_summary)."""
    attributes = QUANTUM_ATTENTION.resolve({"strategy": "tree", "num_samples": [128], "is_causal": 1} | change)
    attributes = {name: value for name, value in attributes.items() if value is not None}
    options = {"threads": threads, "error_estimate": error_estimate, **attributes}
    outputs = _core.quantum_attention(q, k, v, mask, None, None, nonpad, seed, summary, **options)
    return outputs[0], outputs[4], outputs[5]


def relative(found, expected):
    return np.linalg.norm((found - expected).astype(np.float64)) / np.linalg.norm(expected.astype(np.float64))


def check_state(summary, k, v, nonpad):
    """A state holds what its clusters are, and these are good ones."""
    parts = fields(summary, k.shape[-1], v.shape[-1])
    assert sum(x.size for x in parts.values()) == summary.size
    k, v = k.astype(np.float64), v.astype(np.float64)
    for b, h in np.ndindex(k.shape[:2]):
        full = chunks(nonpad[b])
        np.testing.assert_array_equal(parts["keys"][b, h, :full], CLUSTER_KEYS)
        np.testing.assert_array_equal(parts["keys"][b, h, full:, 0], 0)
        for c in range(full):
            members = parts["members"][b, h, c].astype(int)
            np.testing.assert_array_equal(np.sort(members, axis=None), np.arange(CHUNK_KEYS))
            members += SINK_KEYS + c * CHUNK_KEYS
            keys, values = k[b, h][members], v[b, h][members]
            means = keys.mean(1), values.mean(1)
            expected = {
                "mean_key": means[0],
                "mean_value": means[1],
                "key_spread": ((keys - means[0][:, None]) ** 2).sum(2).mean(1),
                "value_spread": ((values - means[1][:, None]) ** 2).sum(2).mean(1),
                "value_norm": (values**2).sum(2).mean(1),
            }
            for name, value in expected.items():
                np.testing.assert_allclose(parts[name][b, h, c], value, rtol=1e-5, atol=1e-5)
            # Most of the spread lies between the clusters; blocks of 16 in a row would leave it within.
            whole = ((k[b, h][members.ravel()] - keys.mean((0, 1))) ** 2).sum(1).mean()
            assert parts["key_spread"][b, h, c].mean() < 0.5 * whole
