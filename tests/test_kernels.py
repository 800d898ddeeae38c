"""The CPU kernels around the borders of their tiles, on every instruction set of this processor, against float64."""

import itertools
from time import perf_counter

import numpy as np
import pytest
from instruction_sets import ISAS, run_on

from qexport import _core
from qexport.ops import QUANTUM_ATTENTION
from qexport.ops.strategies import STRATEGIES

# Rows: one, the few that decoding takes, the border of that, of a vector, of a block. Keys: the borders of a tile of 128.
ROWS = (1, 2, 5, 6, 16, 33, 64, 65)
KEYS = (1, 15, 64, 127, 128, 129, 257)
# (head_size, v_head_size): below, at and above whole vectors of 4, 8 and 16.
SIZES = ((1, 3), (7, 5), (16, 16), (17, 33), (64, 40))
MASKS = (None, "bool", "float", "padding", "all true", "some rows empty")
# float32 scores of up to 64 products of N(0, 1): a few ulp of the largest score, times the spread of V.
TOLERANCE = 2e-5


def make_mask(kind, rng, rows, keys):
    if kind is None:
        return None
    if kind == "float":
        return np.where(rng.random((rows, keys)) < 0.3, -np.inf, rng.standard_normal((rows, keys))).astype(np.float32)
    if kind == "padding":
        return np.arange(keys)[None] < max(1, keys // 2)
    if kind == "all true":
        return np.ones((rows, keys), bool)
    mask = rng.random((rows, keys)) < 0.7
    if kind == "some rows empty":
        mask[::3] = False
    return mask


def reference(q, k, v, mask, causal):
    """softmax(q k^T / sqrt(d) + mask) v in float64 for (heads, n, d) arrays; rows without an allowed key are 0."""
    group = q.shape[0] // k.shape[0]
    k, v = (np.repeat(x, group, 0).astype(np.float64) for x in (k, v))
    scores = q.astype(np.float64) @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + (np.where(mask, 0.0, -np.inf) if mask.dtype == bool else mask)
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    highest = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(highest), highest, 0.0))
    total = p.sum(-1, keepdims=True)
    return p / np.where(total == 0, 1, total) @ v


def run(q, k, v, mask, causal, **change):
    attributes = QUANTUM_ATTENTION.resolve({"strategy": "exact", "control_variate": 0, "is_causal": int(causal)} | change)
    options = {name: value for name, value in attributes.items() if value is not None}
    return _core.quantum_attention(q[None], k[None], v[None], mask, **options)[0]


def worst_error(rows, keys):
    """The largest difference from float64 over head sizes, masks, causality and grouped heads."""
    rng = np.random.default_rng(rows * 1000 + keys)
    worst = 0.0
    for (size, v_size), kind, causal, group in itertools.product(SIZES, MASKS, (False, True), (1, 3)):
        q = rng.standard_normal((2 * group, rows, size), dtype=np.float32)
        k = rng.standard_normal((2, keys, size), dtype=np.float32)
        v = rng.standard_normal((2, keys, v_size), dtype=np.float32)
        mask = make_mask(kind, rng, rows, keys)
        expected = reference(q, k, v, mask, causal)
        y = run(q, k, v, mask, causal)[0]
        # (batch, n, heads * size): other strides, the same numbers.
        flat = [x.transpose(1, 0, 2).reshape(x.shape[1], -1) for x in (q, k, v)]
        y_flat = run(*flat, mask, causal, q_num_heads=2 * group, kv_num_heads=2)[0].reshape(rows, 2 * group, v_size)
        for got in (y, y_flat.transpose(1, 0, 2)):
            assert np.isfinite(got).all()
            worst = max(worst, float(np.abs(got - expected).max()))
    return worst


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("rows", ROWS)
def test_exact_at_the_borders_of_tiles(rows, keys):
    assert worst_error(rows, keys) <= TOLERANCE


@pytest.mark.parametrize("isa", ISAS)
def test_exact_on_every_instruction_set(isa):
    printed = run_on(isa, "import test_kernels as t; print(max(t.worst_error(r, k) for r in t.ROWS for k in (15, 65)))")
    assert float(printed) <= TOLERANCE


@pytest.mark.parametrize(("valid", "like"), [((1 << 63) - 1, 1 << 40), (-(1 << 63), 0)])
@pytest.mark.parametrize("window", ["left_window_size", "right_window_size"])
@pytest.mark.parametrize("rows", [1, 40])
def test_any_number_of_valid_keys(rows, window, valid, like):
    """What lies beyond all keys and windows is as good as what lies further."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, n, 8), dtype=np.float32) for n in (rows, 100, 100))
    attributes = QUANTUM_ATTENTION.resolve({"strategy": "exact", window: 5})
    options = {name: value for name, value in attributes.items() if value is not None}
    found, expected = (_core.quantum_attention(q, k, v, None, None, None, [n], **options)[0] for n in (valid, like))
    np.testing.assert_array_equal(found, expected)
    assert expected.any() == (window == "right_window_size" and like > 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(0, 2, 40, 8), (1, 0, 40, 8), (1, 2, 0, 8)])
def test_an_empty_call_has_an_empty_output(strategy, shape):
    """Also where a strategy would share its budget out among the heads."""
    attributes = QUANTUM_ATTENTION.resolve({"strategy": strategy, "num_samples": [16]})
    options = {name: value for name, value in attributes.items() if value is not None}
    k = np.zeros((shape[0], 2, 300, 8), np.float32)
    assert _core.quantum_attention(np.zeros(shape, np.float32), k, k, **options)[0].shape == shape


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**62])
def test_a_window_that_is_wider_than_all_keys(window):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 8), dtype=np.float32) for n in (40, 100, 100))
    found = run(q, k, v, None, False, left_window_size=window, right_window_size=window)
    np.testing.assert_array_equal(found, run(q, k, v, None, False))


@pytest.mark.parametrize("rows", [1, 40])
def test_nan_under_the_mask_does_not_leak(rows):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 8), dtype=np.float32) for n in (rows, 100, 100))
    mask = np.arange(100)[None] < 60
    clean = run(q, k, v, mask, False)
    k[:, 60:] = np.nan
    np.testing.assert_array_equal(run(q, k, v, mask, False), clean)
    for strategy in ("naive", "stratified", "adaptive", "hybrid"):
        assert np.isfinite(run(q, k, v, mask, False, strategy=strategy, num_samples=[9])).all()


@pytest.mark.parametrize("rows", [1, 40])
def test_nan_in_a_query_stays_in_its_row(rows):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 8), dtype=np.float32) for n in (rows, 100, 100))
    q[1, -1, 0] = np.nan
    for strategy in ("exact", "naive", "stratified", "adaptive", "hybrid"):
        y = run(q, k, v, None, False, strategy=strategy, num_samples=[9])[0]
        assert np.isnan(y[1, -1]).all()
        assert np.isfinite(y[0]).all()
        assert np.isfinite(y[1, :-1]).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 7, 70])
def test_the_lowest_number_on_all_keys_is_no_mask(rows, precision):
    """As of a text that padding fills from the left, under a causal mask: softmax in float32 has a uniform row there."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 16), dtype=np.float32) for n in (rows, 100, 100))
    mask = np.where(rng.random((rows, 100)) < 0.5, 0, np.finfo(np.float32).min).astype(np.float32)
    mask[::2] = np.finfo(np.float32).min
    y = run(q, k, v, mask, False, precision=precision)[0]
    uniform = v.mean(1, dtype=np.float64)[:, None].repeat((rows + 1) // 2, 1)
    np.testing.assert_allclose(y[:, ::2], uniform, atol=TOLERANCE if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 7, 70])
def test_a_number_near_the_highest_on_a_key_takes_it(rows, precision):
    """It is beyond float32 where scores are in base 2, and must not become infinity there."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 16), dtype=np.float32) for n in (rows, 100, 100))
    mask = np.zeros((rows, 100), np.float32)
    mask[:, 17] = 3e38
    y = run(q, k, v, mask, False, precision=precision)[0]
    np.testing.assert_allclose(y, v[:, 17:18].repeat(rows, 1), atol=TOLERANCE if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("strategy", ["exact", "hybrid"])
@pytest.mark.parametrize("rows", [1, 7, 70])
def test_softcap_far_from_all_scores(rows, strategy):
    """Far above it leaves them as they are, far below it makes them 0."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 16), dtype=np.float32) for n in (rows, 100, 100))
    q[:, -1] = 0
    options = {"strategy": strategy, "num_samples": [99]}
    free, even = run(q, k, v, None, False, **options)[0], run(np.zeros_like(q), k, v, None, False, **options)[0]
    for softcap, want in ((1e4, free), (1e8, free), (3e38, free), (1e-8, even), (1e-45, even)):
        np.testing.assert_allclose(run(q, k, v, None, False, softcap=softcap, **options)[0], want, atol=TOLERANCE)


def test_large_scores_do_not_overflow():
    q = np.full((1, 3, 4), 1e4, np.float32)
    k = np.linspace(-1e4, 1e4, 70, dtype=np.float32)[None, :, None].repeat(4, -1)
    v = np.arange(70, dtype=np.float32)[None, :, None].repeat(4, -1)
    np.testing.assert_allclose(run(q, k, v, None, False), 69.0)


@pytest.mark.parametrize("precision", _core.precisions())
def test_scores_far_apart_take_no_longer(precision):
    """Probabilities below 2^-126 took an Intel processor 100 ns for each vector that has one: 75 times as long in all."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 512, 64), dtype=np.float32) for _ in range(3))
    far = [q * 25, k, v, None, False]
    expected = reference(*far)
    assert np.linalg.norm(run(*far, precision=precision)[0] - expected) <= 0.2 * np.linalg.norm(expected)
    seconds = {"near": [], "far": []}
    for _ in range(9):
        for name, inputs in (("near", [q, *far[1:]]), ("far", far)):
            start = perf_counter()
            run(*inputs, precision=precision)
            seconds[name].append(perf_counter() - start)
    assert min(seconds["far"]) < 8 * min(seconds["near"])
