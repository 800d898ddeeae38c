"""Few rows over long caches: split along the keys, read where they lie, in every type."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from cpu_sessions import cpu_session
from onnx import TensorProto, helper

from qexport import _core
from qexport.ops import QUANTUM_ATTENTION
from qexport.ops.proto import make_node

# Lengths around the parts of 2048 keys that are worked on one by one, and around steps of 64.
LENGTHS = (1023, 2047, 2048, 2049, 4100)
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Half a unit in the last place of the output's type; the inputs are exact, all sums are float32.
TOLERANCE = {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}


def reference(q, k, v, allowed=None, bias=None, softcap=0.0):
    """Float64 attention of (batch, heads, rows, d) over (batch, kv_heads, n, d); rows that see nothing are 0."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    highest = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
    total = p.sum(-1, keepdims=True)
    return p / np.where(total == 0, 1, total) @ np.where(p.any((1, 2))[:, None, :, None], v, 0)


def run(q, k, v, mask=None, threads=1, past=None, nonpad=None, **change):
    attributes = QUANTUM_ATTENTION.resolve({"strategy": "exact", "control_variate": 0} | change)
    attributes = {name: value for name, value in attributes.items() if value is not None}
    past = past or (None, None)
    return _core.quantum_attention(q, k, v, mask, *past, nonpad, threads=threads, **attributes)[0]


def inputs(rng, batch, heads, kv_heads, rows, keys, size, v_size, dtype="float32"):
    shapes = (batch, heads, rows, size), (batch, kv_heads, keys, size), (batch, kv_heads, keys, v_size)
    return [rng.standard_normal(shape, dtype=np.float32).astype(TYPES[dtype]) for shape in shapes]


def error(got, expected):
    """The largest error, relative where a value is above 1."""
    return (np.abs(got.astype(np.float64) - expected) / np.maximum(1, np.abs(expected))).max()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("keys", LENGTHS)
def test_every_group_and_head_size(keys, dtype):
    rng = np.random.default_rng(keys)
    for group, (size, v_size) in itertools.product(
        (1, 2, 3, 5, 6, 7, 12, 13), ((64, 64), (24, 80), (48, 112), (33, 96), (7, 5))
    ):
        q, k, v = inputs(rng, 1, 2 * group, 2, 1, keys, size, v_size, dtype)
        assert error(run(q, k, v), reference(q, k, v)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TYPES)
def test_valid_keys_per_batch_item_and_windows(dtype):
    rng = np.random.default_rng(5)
    n, nonpad = 2600, [2600, 2050, 3]
    q, k, v = inputs(rng, 3, 6, 2, 2, n, 32, 32, dtype)
    # What lies behind the valid keys of a static buffer is not looked at.
    for b, valid in enumerate(nonpad):
        k[b, :, valid:] = np.nan
        v[b, :, valid:] = np.nan
    clean = [np.nan_to_num(x.astype(np.float32)) for x in (k, v)]
    valid = np.array(nonpad).reshape(-1, 1, 1, 1)
    key, query = np.arange(n), np.arange(2)[:, None] + valid - 2
    y = run(q, k, v, nonpad=nonpad)
    assert error(y, reference(q, *clean, key < valid)) <= TOLERANCE[dtype]
    y = run(q, k, v, nonpad=nonpad, is_causal=1, left_window_size=1200)
    assert error(y, reference(q, *clean, (key < valid) & (key <= query) & (key >= query - 1200))) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kind", ["bool", "float", "padding", "first half", "nothing"])
def test_masks_over_parts(kind):
    rng = np.random.default_rng(6)
    n = 3000
    q, k, v = inputs(rng, 2, 4, 2, 1, n, 32, 32)
    masks = {
        "bool": rng.random((2, 1, 1, n)) < 0.5,
        "float": np.where(rng.random((1, 4, 1, n)) < 0.3, -np.inf, rng.standard_normal((1, 4, 1, n))).astype(np.float32),
        "padding": np.arange(n) >= np.array([700, 2500]).reshape(2, 1, 1, 1),
        "first half": np.arange(n // 2)[None] < 1100,  # shorter than the keys: the rest is not attended
        "nothing": np.zeros((1, n), bool),
    }
    mask = masks[kind]
    padded = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, n - mask.shape[-1])])
    expected = reference(q, k, v, bias=padded, softcap=3.0) if kind == "float" else reference(q, k, v, padded, softcap=3.0)
    assert error(run(q, k, v, mask, softcap=3.0), expected) <= TOLERANCE["float32"]


@pytest.mark.parametrize("dtype", TYPES)
def test_past_is_read_where_it_lies(dtype):
    rng = np.random.default_rng(7)
    q, k, v = inputs(rng, 2, 6, 2, 3, 2500, 40, 24, dtype)
    split = 2497
    past = k[:, :, :split].copy(), v[:, :, :split].copy()
    y = run(q, k[:, :, split:].copy(), v[:, :, split:].copy(), past=past, is_causal=1)
    allowed = np.arange(2500) <= np.arange(3)[:, None] + split
    assert error(y, reference(q, k, v, allowed)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TYPES)
def test_three_dimensional_cache(dtype):
    rng = np.random.default_rng(8)
    q, k, v = inputs(rng, 2, 4, 2, 1, 1500, 48, 48, dtype)
    flat = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(2, x.shape[2], -1) for x in (q, k, v)]
    y = run(*flat, q_num_heads=4, kv_num_heads=2)
    assert error(y.reshape(2, 1, 4, 48).transpose(0, 2, 1, 3), reference(q, k, v)) <= TOLERANCE[dtype]


def test_threads_do_not_change_bits():
    rng = np.random.default_rng(9)
    q, k, v = inputs(rng, 1, 3, 1, 2, 9000, 64, 64)
    one = run(q, k, v, threads=1)
    for threads in (2, 3, 7):
        for _ in range(5):
            np.testing.assert_array_equal(run(q, k, v, threads=threads), one)


def test_nan_in_a_query_stays_in_its_row_over_parts():
    rng = np.random.default_rng(10)
    q, k, v = inputs(rng, 1, 4, 2, 1, 4500, 16, 16)
    q[0, 1, 0, 3] = np.nan
    y = run(q, k, v)[0, :, 0]
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2, 3]]).all()


def present_session(heads, past_len, size):
    """A model of one node that returns the present, on a cache of `heads` heads."""
    names = ["q", "k", "v", "", "past_key", "past_value"]
    node = make_node("QuantumAttention", names, ["y", "present_key", "present_value"], strategy="exact")
    shapes = {"q": 1, "k": 1, "v": 1, "past_key": past_len, "past_value": past_len}
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, heads, rows, size]) for n, rows in shapes.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.qexport", 1)]
    model = helper.make_model(helper.make_graph([node], "g", values, outputs), opset_imports=opsets, ir_version=10)
    return cpu_session(model)


def run_in_place(heads, past_len=1500, size=16):
    """A step whose present outputs are bound to the memory that its past inputs lie in."""
    rng = np.random.default_rng(11)
    q, k, v = inputs(rng, 1, heads, heads, 1, past_len + 1, size, size)
    cache = {"key": k.copy(), "value": v.copy()}
    for buffer in cache.values():
        buffer[:, :, -1] = np.nan
    session = present_session(heads, past_len, size)
    binding = session.io_binding()
    binding.bind_output("y", "cpu")
    for name, array in {"q": q, "k": k[:, :, -1:].copy(), "v": v[:, :, -1:].copy()}.items():
        binding.bind_cpu_input(name, array)
    for name, buffer in cache.items():
        shape, full = [1, heads, past_len, size], list(buffer.shape)
        binding.bind_input(f"past_{name}", "cpu", 0, np.float32, shape, buffer.ctypes.data)
        binding.bind_output(f"present_{name}", "cpu", 0, np.float32, full, buffer.ctypes.data)
    return session, binding, (q, k, v), cache


def test_present_in_the_memory_of_the_past():
    session, binding, (q, k, v), cache = run_in_place(heads=1)
    session.run_with_iobinding(binding)
    np.testing.assert_array_equal(cache["key"], k)
    np.testing.assert_array_equal(cache["value"], v)
    assert error(binding.copy_outputs_to_cpu()[0], reference(q, k, v)) <= TOLERANCE["float32"]


def test_present_in_the_memory_of_a_past_that_lies_otherwise():
    session, binding, *_ = run_in_place(heads=2)
    with pytest.raises(Exception, match="present_key shares the memory of past_key, which needs batch = kv_heads = 1"):
        session.run_with_iobinding(binding)
