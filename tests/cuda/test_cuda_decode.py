"""Decoding from a key_summary by the CUDA kernels: the state, the formulas, and a state that goes from device to device."""

import numpy as np
import pytest
import summary_cases
from calls import attention
from summary_cases import TYPES, cache, check_state, queries, relative, zeros
from test_decode_error import CASES, LONG, check_against_the_reference, rough, row_errors

from qexport.ops.key_summary import CHUNK_KEYS, SINK_KEYS, chunks, fields, key_summary_shape

TOLERANCES = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}


def step_on(device):
    """summary_cases.step by the kernels of a device."""

    def step(q, k, v, nonpad, summary=None, *, seed=0, error_estimate=False, put=None, **change):
        attributes = {"strategy": "tree", "num_samples": [128], "is_causal": 1} | change
        feeds = {"Q": q, "K": k, "V": v, "nonpad_kv_seqlen": np.array(nonpad), "key_summary": summary}
        feeds = {name: value for name, value in feeds.items() if value is not None}
        found = attention(device, feeds, "float32", seed, attributes, put=put)  # that is: as they are
        return found["Y"], found["error_estimate"], found.get("present_key_summary")

    return step


def outputs(found):
    """(Y, error_estimate) as float32."""
    return [np.asarray(x).astype(np.float32) for x in found[:2]]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", [(32, 24), (64, 64), (7, 5), (72, 130)])
def test_what_a_summary_holds(emulated, sizes, dtype):
    """After a prompt, and as it is made from a state of anything that is not marked."""
    k, v = cache(1, batch=2, kv_heads=1, n=1100, size=sizes[0], v_size=sizes[1], dtype=dtype)
    nonpad = [1100, 600]
    spoilt = np.full(key_summary_shape(*k.shape, sizes[1]), np.nan, np.float32)
    state = step_on(emulated)(queries(1, k, 2, rows=3), k, v, nonpad, spoilt)[2]
    check_state(state, k, v, nonpad)
    assert not np.isnan(fields(state, *sizes)["members"][0]).any()
    expected = fields(summary_cases.run(queries(1, k, 2), k, v, nonpad, zeros(k, v))[1], *sizes)
    ratio = fields(state, *sizes)["key_spread"][0].mean() / expected["key_spread"][0].mean()
    assert 0.95 < ratio < 1.05, "clusters of another quality"


@pytest.mark.parametrize("case", CASES)
def test_output_and_estimate_are_those_of_the_formulas(emulated, case):
    sampled, exact = check_against_the_reference(case, step=step_on(emulated), tolerances=list(TOLERANCES.values()))
    assert sampled > 0
    assert (exact > 0) == ("tolerance" in case or "budget" in case)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("sizes", "change"),
    [
        ((7, 5), {}),
        ((72, 130), {"residual": "james_stein"}),
        ((32, 24), {"softcap": 4.0, "left_window_size": 900, "residual": "unbiased"}),
        ((32, 24), {"num_samples": [16, 4096, 64, 200]}),
        ((32, 24), {"residual": "unbiased", "nonpad": [(1 << 63) - 1, 1300]}),
    ],
    ids=str,
)
def test_a_state_serves_both_devices(emulated, sizes, change, dtype):
    """Made on the one, it gives the other the same output, and is handed back as it was."""
    k, v = cache(5, batch=2, n=1600, size=sizes[0], v_size=sizes[1], dtype=dtype)
    q, nonpad = queries(5, k, 4, rows=2), change.get("nonpad", [1600, 1300])
    change = {name: value for name, value in change.items() if name != "nonpad"}
    ours, theirs = step_on(emulated), summary_cases.step
    for made_by in (ours, theirs):
        state = made_by(q, k, v, nonpad, zeros(k, v))[2]
        found, expected = (by(q, k, v, nonpad, state, error_estimate=True, **change) for by in (ours, theirs))
        np.testing.assert_array_equal(found[2], state)
        np.testing.assert_array_equal(expected[2], state)
        (y, error), (other, other_error) = outputs(found), outputs(expected)
        np.testing.assert_allclose(y, other, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
        np.testing.assert_allclose(error, other_error, rtol=1e-2, atol=1e-6)
        exact = theirs(q, k, v, nonpad, **change)[0].astype(np.float32)
        assert relative(y, exact) > 1e-3, "without any tree the test would pass as well"


def test_state_step_by_step_is_the_state_at_once(emulated):
    """Over the borders of chunks, with a prompt first, and where the cache was cut back."""
    n = SINK_KEYS + 2 * CHUNK_KEYS + 7
    k, v = cache(2, kv_heads=1, n=n)
    step, other = step_on(emulated), cache(3, kv_heads=1, n=n)
    state = step(queries(0, k, 1, n), *other, [n], zeros(k, v))[2]  # of another text, of which 600 keys stay
    k[:, :, :600], v[:, :, :600] = other[0][:, :, :600], other[1][:, :, :600]
    once = step(queries(0, k, 1), k, v, [n], zeros(k, v))[2]
    at = 600
    for rows in (1, 400, 20, 8, 10, 9, 1, 1, 1):
        at = min(at + rows, n)
        y, _, state = step(queries(at, k, 1, rows), k, v, [at], state)
        if rows <= 12:  # else it is no step of decoding
            expected = summary_cases.step(queries(at, k, 1, rows), k, v, [at], state)[0]
            np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)
        assert fields(state, 32, 24)["keys"][0, 0, :, 0].astype(bool).tolist() == [True, at >= SINK_KEYS + 2 * CHUNK_KEYS]
    assert at >= SINK_KEYS + 2 * CHUNK_KEYS
    np.testing.assert_array_equal(state, once)


def test_a_state_in_the_same_memory(emulated, monkeypatch):
    """present_key_summary as key_summary, what a runtime binds."""
    k, v = cache(4, kv_heads=1, n=1100)
    q, step = queries(4, k, 2), step_on(emulated)
    apart = [step(q, k, v, [n], zeros(k, v)) for n in (600, 1100)]
    state, empty = zeros(k, v), emulated.empty
    monkeypatch.setattr(emulated, "empty", lambda shape, dtype: state if shape == state.shape else empty(shape, dtype))
    for n, expected in zip((600, 1100), apart, strict=True):
        found = step(q, k, v, [n], state, put=lambda array: array)
        assert np.shares_memory(found[2], state)
        np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(state, apart[1][2])


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_read_is_not_looked_at(emulated, wrong):
    """Keys behind the valid ones; and a cluster whose keys are read shows in no mean."""
    k, v = cache(10, n=1200)
    q, step = queries(10, k, 4), step_on(emulated)
    clean = step(q, k, v, [700], zeros(k, v))
    k[:, :, 700:], v[:, :, 700:] = wrong, wrong
    found = step(q, k, v, [700], zeros(k, v))
    np.testing.assert_array_equal(found[0], clean[0])
    np.testing.assert_array_equal(found[2], clean[2])
    expected = summary_cases.step(q, k, v, [700], clean[2])[0]
    np.testing.assert_allclose(found[0], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e38, -7.5])
def test_a_spoilt_state_does_no_harm_beyond_its_head(emulated, wrong):
    k, v = rough(32, kv_heads=2)
    q, step = queries(32, k, 4), step_on(emulated)
    state = summary_cases.step(q, k, v, [LONG], zeros(k, v))[2]
    options = {"error_tolerance": 0.2, "error_estimate": True, "residual": "james_stein"}
    clean = step(q, k, v, [LONG], state, **options)
    for name, part in fields(state, k.shape[-1], v.shape[-1]).items():
        if name != "keys":
            part[:, 0] = wrong
    np.testing.assert_array_equal(step(q, k, v, [LONG], state, **options)[0][:, 2:], clean[0][:, 2:])


def test_a_tolerance_is_kept_by_the_same_budgets(emulated):
    """Heads that are sampled, at whatever budget, and heads that are read as a whole, are so on the CPU too."""
    k, v = rough(24, kv_heads=6)
    q, step = 0.5 * queries(24, k, 12), step_on(emulated)
    state = summary_cases.step(q, k, v, [LONG], zeros(k, v))[2]
    sampled = []
    for tolerance in (0.1, 0.25, 1.0):
        options = {"error_tolerance": tolerance, "error_estimate": True, "num_samples": [64]}
        found, expected = (outputs(by(q, k, v, [LONG], state, **options)) for by in (step, summary_cases.step))
        np.testing.assert_array_equal(found[1] == 0, expected[1] == 0)
        np.testing.assert_allclose(found[0], expected[0], rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(found[1], expected[1], rtol=2e-3, atol=1e-6)
        sampled.append((found[1] > 0).sum())
    assert sampled == sorted(set(sampled)), "the wider the tolerance, the more heads keep to it"


@pytest.mark.parametrize(
    ("change", "nonpad"),
    [
        ({"error_tolerance": 0.05}, LONG),
        ({"error_tolerance": 1e-10}, LONG),
        ({"error_tolerance": 0.5}, 3999),
        ({}, 500),
        ({}, 0),
    ],
    ids=str,
)
def test_where_reading_less_does_not_pay_a_step_is_exact(emulated, change, nonpad):
    k, v = cache(26, kv_heads=1, n=LONG)
    q = queries(26, k, 2)
    y, error, state = step_on(emulated)(q, k, v, [nonpad], zeros(k, v), error_estimate=True, **change)
    np.testing.assert_allclose(y, summary_cases.step(q, k, v, [nonpad])[0], rtol=2e-5, atol=2e-5)
    assert (error == 0).all()
    np.testing.assert_array_equal(fields(state, 32, 24)["keys"][0, 0, :, 0] > 0, np.arange(8) < chunks(nonpad))


def test_heads_that_are_too_wide_are_read_as_a_whole(emulated):
    k, v = cache(27, kv_heads=1, n=600, size=300)
    q = queries(27, k, 2)
    y, _, state = step_on(emulated)(q, k, v, [600], np.full_like(zeros(k, v), np.nan), num_samples=[16])
    np.testing.assert_allclose(y, summary_cases.step(q, k, v, [600])[0], rtol=2e-5, atol=2e-5)
    assert not state.any(), "no chunk is summarised"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tolerance", [0.0, 0.15])
def test_long_caches(gpu, dtype, tolerance):
    """Where a GPU decodes from the summary, the CPU says the same from the same state, and the error is that of the tree."""
    n = 48000
    # So many heads that a GPU would not rather read all keys.
    k, v = (np.tile(x, (1, 8, 1, 1)) for x in cache(40, kv_heads=8, n=n, size=64, v_size=64, dtype=dtype))
    q, options = queries(40, k, 64), {"num_samples": [2000], "error_tolerance": tolerance, "residual": "james_stein"}
    state = step_on(gpu)(q, k, v, [n], zeros(k, v))[2]
    check_state(state[:, :1], k[:, :1], v[:, :1], [n])
    found, expected = (by(q, k, v, [n], state, error_estimate=True, **options) for by in (step_on(gpu), summary_cases.step))
    (y, error), (other, other_error) = outputs(found), outputs(expected)
    # But for rows where rounding ranks two clusters the other way round, or draws another one.
    assert np.isclose(y, other, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype]).all(-1).mean() > 0.9
    assert np.isclose(error, other_error, rtol=2e-2, atol=1e-6).mean() > 0.9
    assert (error > 0).any() if tolerance else (error > 0).all()
    assert row_errors(y, outputs(summary_cases.step(q, k, v, [n]))[0]).max() > 1e-3
