"""QuantumAttention by its CUDA kernels, against the float64 reference, as test_ops.py has it for the CPU."""

import itertools

import numpy as np
import pytest
from attention_backends import DTYPES, rounded, run_ref
from attention_cases import CASES, Case
from calls import SEED, attention, ids
from devices import split
from test_ops import DRAWING, SAMPLES, TOLERANCE, allowed_flips, assert_close

from qexport.ops.strategies import STRATEGIES

# One of each kind: what the emulation takes beside float32.
FEW = (
    "plain",
    "longer_than_a_tile",
    "3d_grouped_odd",
    "softcap_mask_causal",
    "nonpad_causal",
    "causal_with_past",
    "window",
    "nonpad_wide_window",
)


def case_of(name):
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize(
    ("device", "case", "dtype"),
    split(itertools.product(CASES, DTYPES), lambda case, dtype: dtype == "float32" or case.name in FEW),
    ids=ids,
    indirect=["device"],
)
def test_exact(device, case, dtype):
    feeds, attributes = rounded(case.inputs(), dtype), case.all_attributes(strategy="exact")
    got = attention(device, feeds, dtype, 0, attributes)
    assert_close(got["Y"], run_ref(feeds, dtype, 0, attributes)["Y"], dtype, "Y")
    assert not got["error_estimate"].any()


@pytest.mark.parametrize(
    ("device", "case", "strategy", "control_variate", "dtype"),
    [
        *split(
            itertools.product(CASES, DRAWING, (0, 1), DTYPES),
            lambda case, strategy, control_variate, dtype: case.name in FEW and (dtype == "float32" or control_variate),
        ),
        *(("emulated_sm75", case_of("longer_than_a_tile"), s, 1, t) for s in DRAWING for t in ("float16", "bfloat16")),
    ],
    ids=ids,
    indirect=["device"],
)
def test_sampled(device, case, strategy, control_variate, dtype):
    """The keys that the reference draws, from the same Philox words."""
    feeds = rounded(case.inputs(), dtype)
    attributes = case.all_attributes(strategy=strategy, num_samples=SAMPLES, control_variate=control_variate, layer=3)
    want = run_ref(feeds, dtype, SEED, attributes)["Y"]
    flips = allowed_flips(case.batch * case.q_heads * case.q_len, SAMPLES, case.past_len + case.kv_len)
    assert_close(attention(device, feeds, dtype, SEED, attributes)["Y"], want, dtype, "Y", flips)


@pytest.mark.parametrize(
    ("device", "case", "strategy", "mode"),
    split(
        itertools.product(CASES, STRATEGIES, range(4)),
        lambda case, strategy, mode: case.name in FEW and (mode == 3 or strategy == "exact"),
    ),
    ids=ids,
    indirect=["device"],
)
def test_probabilities_beside_the_output(device, case, strategy, mode):
    feeds = case.inputs()
    attributes = case.all_attributes(strategy=strategy, num_samples=SAMPLES, qk_matmul_output_mode=mode, layer=3)
    got = attention(device, feeds, "float32", SEED, attributes, probabilities=True)
    want = run_ref(feeds, "float32", SEED, attributes)
    assert_close(got["qk_matmul_output"], want["qk_matmul_output"], "float32", "qk_matmul_output")
    flips = allowed_flips(case.batch * case.q_heads * case.q_len, SAMPLES, case.past_len + case.kv_len)
    assert_close(got["Y"], want["Y"], "float32", "Y", flips)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["exact", "stratified", "tree"])
@pytest.mark.parametrize("name", ["causal_with_past", "3d_with_past", "plain"])
def test_present(device, name, strategy, dtype):
    """Copies of the past and the new rows, to the bit."""
    feeds = rounded(case_of(name).inputs(), dtype)
    attributes = case_of(name).all_attributes(strategy=strategy, num_samples=SAMPLES)
    got, want = attention(device, feeds, dtype, 0, attributes, present=True), run_ref(feeds, dtype, 0, attributes)
    assert np.array_equal(got["present_key"], want["present_key"])
    assert np.array_equal(got["present_value"], want["present_value"])
    flips = allowed_flips(4 * 2 * 7, SAMPLES, 30)
    assert_close(got["Y"], want["Y"], dtype, "Y", flips)


@pytest.mark.parametrize(
    ("device", "case", "strategy"),
    split(
        itertools.product(CASES, [s for s in STRATEGIES if s not in ("exact", "naive")]),
        lambda case, strategy: case.name in FEW,
    ),
    ids=ids,
    indirect=["device"],
)
def test_enough_samples_are_exact(device, case, strategy):
    feeds, samples = case.inputs(), case.past_len + case.kv_len
    want = run_ref(feeds, "float32", 0, case.all_attributes(strategy="exact"))["Y"]
    got = attention(device, feeds, "float32", 9, case.all_attributes(strategy=strategy, num_samples=samples))["Y"]
    assert_close(got, want, "float32", "Y")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_samples_per_head(device, strategy):
    case = case_of("longer_than_a_tile")
    feeds, attributes = case.inputs(), case.all_attributes(strategy=strategy, num_samples=[4, 150, 9, 31])
    want = run_ref(feeds, "float32", 5, attributes)["Y"]
    flips = allowed_flips(case.batch * case.q_heads * case.q_len, 64, case.kv_len)
    assert_close(attention(device, feeds, "float32", 5, attributes)["Y"], want, "float32", "Y", flips)


@pytest.mark.parametrize("strategy", DRAWING)
@pytest.mark.parametrize("keys", [4000, 12000])
def test_rows_that_fill_shared_memory(device, keys, strategy):
    """Scores of 4000 keys leave it room for fewer rows at a time, those of 12000 lie in global memory."""
    rng = np.random.default_rng(keys)
    feeds = {name: rng.standard_normal((1, 1, n, 8), dtype=np.float32) for name, n in (("Q", 13), ("K", keys), ("V", keys))}
    attributes = {"strategy": strategy, "num_samples": SAMPLES, "layer": 3, "control_variate": int(strategy != "hybrid")}
    want = run_ref(feeds, "float32", SEED, attributes)["Y"]
    off = np.abs(attention(device, feeds, "float32", SEED, attributes)["Y"] - want).max(-1)
    # A weight is p_j / pi_j, of many small numbers in float32; another draw moves a row by far more.
    assert (off > 1e-3).sum() <= allowed_flips(13, SAMPLES, keys)
    assert np.median(off) < 1e-5


@pytest.mark.parametrize("strategy", DRAWING)
def test_seed_and_layer_choose_the_draws(device, strategy):
    def y(seed, layer):  # without control variate: with it, `hybrid` draws nothing
        attributes = {"strategy": strategy, "num_samples": 4, "layer": layer, "control_variate": 0}
        return attention(device, case_of("plain").inputs(), "float32", seed, attributes)["Y"]

    assert np.array_equal(y(1, 0), y(1, 0))
    assert not np.array_equal(y(1, 0), y(2, 0))
    assert not np.array_equal(y(1, 0), y(1, 1))
    assert not np.array_equal(y(1, 0), y(1 + (1 << 32), 0)), "the high word of the seed must count"


def gaps(device):
    """Brings an array to the device with other elements between its rows, and with its heads inside."""

    def put(array):
        if array.ndim < 3:
            return device.put(array)
        wide = np.full((*array.shape[:-1], array.shape[-1] + 8), 77, array.dtype)
        wide[..., : array.shape[-1]] = array
        if array.ndim == 4:
            return device.put(np.ascontiguousarray(wide.swapaxes(1, 2))).swapaxes(1, 2)[..., : array.shape[-1]]
        return device.put(wide)[..., : array.shape[-1]]

    return put


@pytest.mark.parametrize(
    ("device", "name", "strategy", "dtype"),
    split(
        itertools.product(
            ("3d_grouped_odd", "causal_with_past", "longer_than_a_tile"),
            ("exact", "stratified", "adaptive", "hybrid"),
            DTYPES,
        ),
        lambda name, strategy, dtype: strategy == "exact" or (dtype == "float32" and name != "longer_than_a_tile"),
    ),
    indirect=["device"],
)
def test_rows_may_lie_apart(device, name, strategy, dtype):
    """Strides of Q, K and V are read where they lie; the same bits come out."""
    feeds, attributes = case_of(name).inputs(), case_of(name).all_attributes(strategy=strategy, num_samples=SAMPLES)
    packed = attention(device, feeds, dtype, 3, attributes)["Y"]
    assert_close(attention(device, feeds, dtype, 3, attributes, put=gaps(device))["Y"], packed, dtype, "Y")


@pytest.mark.parametrize(
    ("strategy", "residual"),
    [("exact", "none"), ("stratified", "none"), ("tree", "none"), ("tree", "unbiased")],
)
def test_the_output_may_begin_anywhere(emulated, monkeypatch, strategy, residual):
    """Where the whole units that tiles write do not fit."""
    shape = Case("tree", 1, 2, 1, q_len=140, kv_len=330, head_size=16, v_head_size=24)
    feeds = rounded(shape.inputs(), "float16")
    attributes = {"strategy": strategy, "num_samples": 64, "residual": residual}
    want = attention(emulated, feeds, "float16", SEED, attributes)["Y"]
    packed = emulated.empty

    def between_units(shape, dtype):
        array = packed(int(np.prod(shape)) + 1, dtype)
        return array[1:].reshape(shape)

    monkeypatch.setattr(emulated, "empty", between_units)
    assert_close(attention(emulated, feeds, "float16", SEED, attributes)["Y"], want, "float16", "Y")


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "tree"])
@pytest.mark.parametrize("control_variate", [0, 1])
@pytest.mark.parametrize(("rows", "dtype"), [(1, "float32"), (40, "float32"), (40, "float16")])
def test_nan_stays_where_it_belongs(device, rows, dtype, control_variate, strategy):
    """Under the mask nowhere, in a query in its row. Means of values are over all keys, whatever the mask: with them, V has
    numbers there."""
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((1, 2, n, 8), dtype=np.float32) for name, n in (("Q", rows), ("K", 70), ("V", 70))}
    feeds["attn_mask"] = np.arange(70)[None] < 60
    attributes = {"strategy": strategy, "num_samples": 9, "control_variate": control_variate}
    clean = attention(device, feeds, dtype, 3, attributes)["Y"]
    feeds["K"][:, :, 60:] = np.nan
    if not control_variate:
        feeds["V"][:, :, 60:] = np.inf
    np.testing.assert_array_equal(attention(device, feeds, dtype, 3, attributes)["Y"], clean)
    feeds["Q"][0, 1, -1, 0] = np.nan
    y = attention(device, feeds, dtype, 3, attributes)["Y"][0]
    assert np.isnan(y[1, -1]).all()
    assert np.isfinite(y[0]).all()
    assert np.isfinite(y[1, :-1]).all()


@pytest.mark.parametrize("strategy", ["exact", "stratified", "hybrid"])
@pytest.mark.parametrize(("rows", "dtype"), [(1, "float32"), (40, "float32"), (40, "float16")])
def test_softcap_far_from_all_scores(device, rows, dtype, strategy):
    """Far above it leaves them as they are, far below it makes them 0."""
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((1, 2, n, 16), dtype=np.float32) for name, n in (("Q", rows), ("K", 70), ("V", 70))}
    even = feeds | {"Q": np.zeros_like(feeds["Q"])}

    def y(given, **softcap):
        attributes = {"strategy": strategy, "num_samples": 60} | softcap
        return attention(device, rounded(given, dtype), dtype, 3, attributes)["Y"]

    free, uniform = y(feeds), y(even)
    for softcap, want in ((1e5, free), (3e38, free), (1e-8, uniform)):
        np.testing.assert_allclose(y(feeds, softcap=softcap), want, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("strategy", ["exact", "stratified", "naive"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_number_near_the_highest_on_a_key_takes_it(device, dtype, strategy):
    """It is beyond float32 where scores are in base 2, and must not become infinity there."""
    case = Case("plain", 1, 2, 2, q_len=40, kv_len=70, head_size=16, v_head_size=16)
    feeds = rounded(case.inputs(), dtype)
    feeds["attn_mask"] = np.zeros((40, 70), np.float32)
    feeds["attn_mask"][:, 17] = 3e38
    y = attention(device, feeds, dtype, 3, {"strategy": strategy, "num_samples": 9})["Y"]
    np.testing.assert_allclose(y, feeds["V"][:, :, 17:18].repeat(40, 2), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("size", [64, 4096])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scores_alone_are_returned_at_any_head_size(device, dtype, size):
    """Neither what a sampling strategy gathers of V nor fragments of the queries has to fit into shared memory for them."""
    case = Case("scores", 1, 1, 1, q_len=5, kv_len=40, head_size=2 * size, v_head_size=size)
    feeds = rounded(case.inputs(), dtype)
    for mode in (0, 3):
        attributes = {"strategy": "exact", "qk_matmul_output_mode": mode}
        got = attention(device, feeds, dtype, 3, attributes, probabilities=True)
        want = run_ref(feeds, dtype, 3, attributes)
        for name in ("Y", "qk_matmul_output"):
            limit = TOLERANCE[dtype] * max(1, np.abs(want[name]).max())
            np.testing.assert_allclose(got[name], want[name], 0, limit)


@pytest.mark.parametrize(("valid", "like"), [((1 << 63) - 1, 1 << 40), (-(1 << 63), 0)])
@pytest.mark.parametrize("strategy", ["exact", "stratified"])
def test_any_number_of_valid_keys(device, strategy, valid, like):
    """What lies beyond all keys and windows is as good as what lies further."""

    def y(nonpad):
        case = Case("far", 1, 2, 2, q_len=40, kv_len=70, head_size=16, v_head_size=16, nonpad=(nonpad,))
        attributes = {"strategy": strategy, "num_samples": 9, "right_window_size": 5}
        return attention(device, case.inputs(), "float16", 3, attributes)["Y"]

    np.testing.assert_array_equal(y(valid), y(like))
    assert y(valid).any() == (like > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(device, dtype):
    ends = np.linspace(-200, 200, 70, dtype=np.float32)[None, None, :, None].repeat(4, -1)
    feeds = {
        "Q": np.full((1, 1, 3, 4), 200, np.float32),
        "K": ends,
        "V": np.arange(70.0, dtype=np.float32)[None, None, :, None],
    }
    feeds["V"] = feeds["V"].repeat(4, -1)
    np.testing.assert_allclose(attention(device, feeds, dtype, 0, {"strategy": "exact"})["Y"], 69.0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_queries_and_no_keys(device, strategy):
    def y(queries, keys):
        feeds = {name: np.zeros((1, 2, n, 4), np.float32) for name, n in (("Q", queries), ("K", keys), ("V", keys))}
        return attention(device, feeds, "float32", 0, {"strategy": strategy, "num_samples": 3})["Y"]

    assert y(0, 5).shape == (1, 2, 0, 4)
    np.testing.assert_array_equal(y(3, 0), np.zeros((1, 2, 3, 4)))
