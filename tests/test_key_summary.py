"""Decoding with strategy tree from a key_summary: the state, the formulas, the error on keys that cluster."""

import itertools

import numpy as np
import onnxruntime
import pytest
import torch
from cpu_sessions import cpu_session
from onnx import TensorProto, helper
from summary_cases import TYPES, cache, check_state, queries, relative, run, zeros

from qexport.ops.key_summary import CHUNK_KEYS, SINK_KEYS, fields
from qexport.ops.proto import function_proto, make_node
from qexport.ops.quantum_attention_ref import quantum_attention_ref


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", [(32, 24), (64, 64), (7, 5)])
def test_what_a_summary_holds(sizes, dtype):
    k, v = cache(1, batch=2, size=sizes[0], v_size=sizes[1], dtype=dtype)
    summary = run(queries(1, k, 4), k, v, [2100, 1500], zeros(k, v))[1]
    check_state(summary, k, v, [2100, 1500])


def test_state_step_by_step_is_the_state_at_once():
    n = SINK_KEYS + 3 * CHUNK_KEYS + 7
    k, v = cache(2, n=n)
    state = zeros(k, v)
    at, steps = 0, iter([500, 20, 8, 1, 1, 1, 600, 300, 100, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    while at < n:
        rows = min(next(steps, 3), n - at)
        at += rows
        state = run(queries(at, k, 2, rows), k, v, [at], state)[1]
    once = run(queries(0, k, 2, n), k, v, [n], zeros(k, v))[1]
    np.testing.assert_array_equal(state, once)
    late = run(queries(0, k, 2), k, v, [n], zeros(k, v))[1]  # nothing was kept until here
    np.testing.assert_array_equal(late, once)


def test_a_cache_that_is_cut_back_and_filled_again():
    k, v = cache(3)
    state = run(queries(1, k, 2, 2100), k, v, [2100], zeros(k, v))[1]
    other_k, other_v = cache(4)
    k[:, :, 700:], v[:, :, 700:] = other_k[:, :, 700:], other_v[:, :, 700:]
    for length in range(701, 2100, 200):
        state = run(queries(1, k, 2, 200 if length > 701 else 1), k, v, [length], state)[1]
    state = run(queries(1, k, 2, 2100 - length), k, v, [2100], state)[1]
    np.testing.assert_array_equal(state, run(queries(1, k, 2), k, v, [2100], zeros(k, v))[1])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "change", [{}, {"softcap": 4.0}, {"left_window_size": 1300}, {"num_samples": [64, 96, 160, 4096]}], ids=str
)
def test_output_is_that_of_the_formulas(change, dtype):
    """The reference starts from the same state. No two gains are alike but for rounding, or it might choose otherwise."""
    k, v = cache(5, batch=2, dtype=dtype)
    q = queries(5, k, 4, rows=2)
    nonpad = [2100, 1700]
    y, summary = run(q, k, v, nonpad, zeros(k, v), **change)
    tensors = (torch.from_numpy(x.astype(np.float64)) for x in (q, k, v))
    attributes = {"strategy": "tree", "num_samples": [128], "is_causal": 1} | change
    outputs = quantum_attention_ref(
        *tensors, nonpad_kv_seqlen=torch.tensor(nonpad), key_summary=torch.from_numpy(summary), **attributes
    )
    tolerance = {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}[dtype]
    np.testing.assert_allclose(y.astype(np.float64), outputs[0].numpy(), rtol=tolerance, atol=tolerance)
    exact = run(q, k, v, nonpad, **change)[0].astype(np.float64)
    assert relative(y.astype(np.float64), exact) > 1e-3  # the test would pass without any tree otherwise


def test_reference_clusters_as_well_as_the_kernel():
    k, v = cache(6)
    q = queries(6, k, 2)
    native = fields(run(q, k, v, [2100], zeros(k, v))[1], 32, 24)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    summary = torch.from_numpy(zeros(k, v))
    attributes = {"nonpad_kv_seqlen": torch.tensor([2100]), "key_summary": summary, "strategy": "tree", "is_causal": 1}
    reference = fields(quantum_attention_ref(*tensors, **attributes)[5].numpy(), 32, 24)
    ratio = native["key_spread"].mean() / reference["key_spread"].mean()
    assert 0.9 < ratio < 1.1, ratio


def test_error_falls_with_samples():
    k, v = cache(7, n=4200, size=64, v_size=64)
    q = queries(7, k, 4)
    exact, state = run(q, k, v, [4200])[0], zeros(k, v)
    errors = [relative(run(q, k, v, [4200], state, num_samples=[s])[0], exact) for s in (16, 64, 256, 1024)]
    assert errors[-1] < 0.05, errors
    assert all(a > b for a, b in itertools.pairwise(errors)), errors
    assert run(q, k, v, [4200], state, num_samples=[4096])[0] == pytest.approx(exact, abs=1e-5)


def test_few_keys_are_exact():
    k, v = cache(8, n=2100)
    q = queries(8, k, 4)
    for nonpad in (1, 16, 300, 527):
        np.testing.assert_allclose(run(q, k, v, [nonpad], zeros(k, v))[0], run(q, k, v, [nonpad])[0], atol=2e-6)


def test_threads_do_not_change_bits():
    k, v = cache(9, batch=3)
    q = queries(9, k, 4)
    one = run(q, k, v, [2100, 1000, 1601], zeros(k, v))
    for threads in (2, 5):
        for found, expected in zip(run(q, k, v, [2100, 1000, 1601], zeros(k, v), threads=threads), one, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_what_lies_behind_the_valid_keys_is_not_read():
    k, v = cache(10)
    q = queries(10, k, 4)
    clean = run(q, k, v, [1500], zeros(k, v))
    k[:, :, 1500:], v[:, :, 1500:] = np.nan, np.nan
    np.testing.assert_array_equal(run(q, k, v, [1500], zeros(k, v))[0], clean[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "exact"}, "key_summary needs strategy tree, got exact"),
        ({"nonpad": None}, "key_summary needs nonpad_kv_seqlen"),
        (
            {"summary": np.zeros((1, 2, 3, 9), np.float32)},
            r"key_summary has shape \(1, 2, 3, 9\), expected \(1, 2, 4, 2432\)",
        ),
        ({"summary": np.zeros((1, 2, 4, 2432), np.float16)}, "key_summary must be float32"),
    ],
)
def test_errors(change, message):
    k, v = cache(11)
    options = {"nonpad": [2100], "summary": zeros(k, v)} | change
    with pytest.raises(ValueError, match=message):
        run(queries(11, k, 4), k, v, **options)


def model(k, v, outputs, function=False):
    """One node that decodes; inputs q, k, v, nonpad, key_summary."""
    names = ["q", "k", "v", "", "", "", "nonpad", "", "key_summary"]
    results = [name if name in outputs else "" for name in ("y", "", "", "", "", "present_key_summary")]
    node = make_node("QuantumAttention", names, results, strategy="tree", num_samples=[128], is_causal=1)
    inputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT, list(a.shape)) for x, a in (("k", k), ("v", v))]
    inputs.append(helper.make_tensor_value_info("q", TensorProto.FLOAT, [1, 4, "rows", k.shape[-1]]))
    inputs.append(helper.make_tensor_value_info("nonpad", TensorProto.INT64, [1]))
    inputs.append(helper.make_tensor_value_info("key_summary", TensorProto.FLOAT, list(zeros(k, v).shape)))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.qexport", 1)]
    functions = [function_proto("QuantumAttention", 24, 6)] if function else []
    graph = helper.make_graph([node], "g", inputs, values)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)


def test_onnxruntime_in_place_and_not():
    k, v = cache(12)
    q = queries(12, k, 4)
    feeds = {"q": q, "k": k, "v": v, "nonpad": np.array([2100]), "key_summary": zeros(k, v)}
    expected = run(q, k, v, [2100], zeros(k, v))
    sess = cpu_session(model(k, v, ["y", "present_key_summary"]))
    assert sess.get_outputs()[1].shape == list(zeros(k, v).shape)
    for found, wanted in zip(sess.run(None, feeds), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    binding = sess.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x) for name, x in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y", "cpu")
    binding.bind_ortvalue_output("present_key_summary", values["key_summary"])
    for _ in range(2):
        sess.run_with_iobinding(binding)
        np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], expected[0])
        np.testing.assert_array_equal(values["key_summary"].numpy(), expected[1])


def test_a_summary_that_is_only_read():
    k, v = cache(13)
    q = queries(13, k, 4)
    y, state = run(q, k, v, [2100], zeros(k, v))
    sess = cpu_session(model(k, v, ["y"]))
    feeds = {"q": q, "k": k, "v": v, "nonpad": np.array([2100])}
    np.testing.assert_array_equal(sess.run(None, feeds | {"key_summary": state})[0], y)
    exact = run(q, k, v, [2100])[0]  # nothing is summarised: all of it is read
    np.testing.assert_allclose(sess.run(None, feeds | {"key_summary": zeros(k, v)})[0], exact, atol=2e-6)


def test_without_the_library_the_summary_passes_through():
    k, v = cache(14)
    q = queries(14, k, 4)
    state = np.arange(zeros(k, v).size, dtype=np.float32).reshape(zeros(k, v).shape)
    feeds = {"q": q, "k": k, "v": v, "nonpad": np.array([2100]), "key_summary": state}
    y, present = cpu_session(model(k, v, ["y", "present_key_summary"], function=True), library=False).run(None, feeds)
    np.testing.assert_array_equal(present, state)
    assert relative(y, run(q, k, v, [2100])[0]) < 1e-5
