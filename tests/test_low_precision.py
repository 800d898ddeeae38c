"""Exact attention in bfloat16 and int8 against float64: every form, the borders of blocks, bad numbers, threads."""

import dataclasses
from itertools import product

import numpy as np
import pytest
from attention_backends import run_binding, run_ref
from attention_cases import CASES, Case
from instruction_sets import ISAS, run_on
from test_kernels import make_mask, reference, run

from qexport import _core

pytestmark = pytest.mark.skipif(
    "bf16" not in _core.precisions(), reason=f"needs products in bfloat16, the kernels for {_core.isa()} have none"
)

# Relative Frobenius error of the output, inputs N(0, 1). bfloat16 moves q, k, v and p by 2^-9 / sqrt(3) of themselves (root
# mean square), which comes to 0.2 to 0.35 %. A step of int8 is 1/127 of the largest number of its row, which is 2.5 sigma:
# 0.6 % of sigma in q and in k, 0.7 to 1 % in all. Masks and softcap leave few keys to average over: the double.
TOLERANCE = {"bf16": 0.007, "int8": 0.02}
PRECISIONS = tuple(TOLERANCE)


def relative(y, expected):
    return float(np.linalg.norm(y - expected) / max(np.linalg.norm(expected), 1e-30))


def grown(case, keys):
    """The case with enough rows for the low-precision kernel, and `keys` times its keys."""
    return dataclasses.replace(case, q_len=case.q_len + 60, kv_len=case.kv_len * keys + (keys > 1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("keys", [1, 9])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_form(case, keys, precision):
    case = grown(case, keys)
    feeds = case.inputs()
    attributes = case.all_attributes(strategy="exact")
    expected = run_ref(feeds, "float32", 0, attributes)["Y"]
    exact = run_binding(feeds, "float32", 0, attributes)["Y"]
    y = run_binding(feeds, "float32", 0, attributes | {"precision": precision})["Y"]
    assert relative(y, expected) <= TOLERANCE[precision]
    if np.abs(expected).max() > 0:
        assert relative(y, exact) > 1e-5  # the low-precision kernel did run


@pytest.mark.parametrize("isa", sorted({"avx512bf16", "amx"}.intersection(ISAS)))
def test_every_form_on_every_instruction_set(isa):
    cases = "t.product(t.CASES, (1, 9), t.PRECISIONS)"
    code = f"import test_low_precision as t; print(len([t.test_every_form(*case) for case in {cases}]))"
    assert int(run_on(isa, code)) == 2 * len(CASES) * len(PRECISIONS)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(dtype, precision):
    case = grown(next(case for case in CASES if case.name == "causal_with_past"), 9)
    feeds = case.inputs()
    attributes = case.all_attributes(strategy="exact")
    expected = run_ref(feeds, "float32", 0, attributes)["Y"]
    assert relative(run_binding(feeds, dtype, 0, attributes | {"precision": precision})["Y"], expected) <= 0.02


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 127, 128, 129, 257])
@pytest.mark.parametrize("rows", [24, 33, 56, 57, 64, 65])
def test_borders_of_blocks(rows, keys, precision):
    rng = np.random.default_rng(rows * 1000 + keys)
    masks = (None, "bool", "float", "padding", "some rows empty")
    for (size, v_size), kind, causal in product(((1, 3), (17, 33), (64, 40), (130, 64)), masks, (False, True)):
        q = rng.standard_normal((2, rows, size), dtype=np.float32)
        k = rng.standard_normal((2, keys, size), dtype=np.float32)
        v = rng.standard_normal((2, keys, v_size), dtype=np.float32)
        mask = make_mask(kind, rng, rows, keys)
        expected = reference(q, k, v, mask, causal)
        y = run(q, k, v, mask, causal, precision=precision)[0]
        # What is averaged over many keys nearly cancels, and its rounding does not: count in sum p |v|.
        size_of_terms = np.linalg.norm(reference(q, k, np.abs(v), mask, causal))
        assert np.linalg.norm(y - expected) <= TOLERANCE[precision] * size_of_terms
        if mask is not None and mask.dtype == bool:
            assert not y[:, ~np.broadcast_to(mask, (rows, keys)).any(-1)].any()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("softcap", [0.0, 300.0])
def test_what_all_keys_have_in_common_is_not_rounded(precision, softcap):
    """Trained keys often share a mean much larger than their spread (vision transformers); softmax does not see it, and its
    rounding alone would be several percent of the output here."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 100, 64), dtype=np.float32) for _ in range(3))
    k += 8 * rng.standard_normal(64, dtype=np.float32)
    exact, low = (run(q, k, v, None, False, softcap=softcap, precision=p)[0] for p in ("fp32", precision))
    assert relative(low, exact) <= TOLERANCE[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_do_not_change_a_bit(precision):
    case = Case("threads", q_heads=6, kv_heads=3, q_len=200, kv_len=200, attributes={"is_causal": 1})
    attributes = case.all_attributes(strategy="exact", precision=precision)
    one, three = (run_binding(case.inputs(), "float32", 0, attributes, threads)["Y"] for threads in (1, 3))
    np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_bad_keys_under_the_mask_do_not_leak(precision, bad):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 8), dtype=np.float32) for n in (40, 100, 100))
    mask = np.arange(100)[None] < 60
    expected = run(q, k, v, mask, False)[0]
    k[:, 60:] = bad
    assert relative(run(q, k, v, mask, False, precision=precision)[0], expected) <= TOLERANCE[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_padding_is_never_read(precision):
    case = grown(next(case for case in CASES if case.name == "nonpad"), 9)
    feeds = case.inputs()
    attributes = case.all_attributes(strategy="exact", precision=precision)
    clean = run_binding(feeds, "float32", 0, attributes)["Y"]
    for batch, length in enumerate(case.nonpad):
        feeds["K"][batch, :, length:] = 3e38
        feeds["V"][batch, :, length:] = np.nan
    np.testing.assert_array_equal(run_binding(feeds, "float32", 0, attributes)["Y"], clean)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_stays_where_it_belongs(precision):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 8), dtype=np.float32) for n in (40, 100, 100))
    q[1, -1, 0] = np.nan
    y = run(q, k, v, None, False, precision=precision)[0]
    assert np.isnan(y[1, -1]).all()
    assert np.isfinite(y[0]).all()
    assert np.isfinite(y[1, :-1]).all()
    k[0, 3, 1] = np.nan
    y = run(q, k, v, None, True, precision=precision)[0]
    assert np.isfinite(y[0, :3]).all()
    assert np.isnan(y[0, 3:]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_key_with_all_the_mass(precision):
    q = np.full((1, 30, 4), 1e4, np.float32)
    k = np.linspace(-1e4, 1e4, 70, dtype=np.float32)[None, :, None].repeat(4, -1)
    v = np.arange(70, dtype=np.float32)[None, :, None].repeat(4, -1)
    np.testing.assert_allclose(run(q, k, v, None, False, precision=precision)[0], 69.0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("highest", [5, 12, 40, 300])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_that_rise_from_tile_to_tile(precision, highest, causal):
    # The running maximum moves a little, by more than the slack, and by more than the kernel lets pass in a tile.
    rng = np.random.default_rng(highest)
    rows, keys = (700, 700) if causal else (70, 700)
    q = np.ones((1, rows, 16), np.float32) + 0.1 * rng.standard_normal((1, rows, 16), dtype=np.float32)
    k = (np.linspace(-1, 1, keys, dtype=np.float32) * highest / 8)[None, :, None] * np.ones(16, np.float32)
    k += rng.standard_normal(k.shape, dtype=np.float32)
    v = rng.standard_normal((1, keys, 20), dtype=np.float32)
    expected = reference(q, k, v, None, causal)
    y = run(q, k, v, None, causal, precision=precision)[0]
    # A score s is off by its share of rounding, about 2^-9 s in bfloat16 and 2^-7 s in int8, and so is the weight.
    limit = {"bf16": 2**-8, "int8": 2**-6}[precision] * max(highest, 4)
    assert relative(y, expected) <= min(limit, 0.5)


@pytest.mark.parametrize("left_window", [0, 5, 40])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_windows_that_begin_in_any_block(precision, left_window):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 300, 40), dtype=np.float32) for _ in range(3))
    seen = np.tri(300, dtype=bool) & ~np.tri(300, k=-left_window - 1, dtype=bool)
    y = run(q, k, v, None, True, left_window_size=left_window, precision=precision)[0]
    assert relative(y, reference(q, k, v, seen, False)) <= 2 * TOLERANCE[precision]


@pytest.mark.parametrize("residual", ["none", "james_stein"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("size", "v_size"), [(32, 32), (48, 40), (80, 16)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tree_errs_as_in_float32(precision, size, v_size, causal, residual):
    """So long that the tree pays wherever products are fast; the last cluster and the last pair of blocks are not full."""
    rng = np.random.default_rng(size)
    keys = 6000
    centres = 2 * rng.standard_normal((200, size), dtype=np.float32)
    kinds = rng.integers(0, 200, keys)
    k = (centres[kinds] + 0.3 * rng.standard_normal((keys, size), dtype=np.float32))[None]
    v = rng.standard_normal((200, v_size), dtype=np.float32)[kinds] + rng.standard_normal((keys, v_size), dtype=np.float32)
    q = (centres[kinds] * 0.5 + rng.standard_normal((keys, size), dtype=np.float32))[None]
    v = v[None]
    exact = run(q, k, v, None, causal)[0]
    change = {"strategy": "tree", "num_samples": [128], "residual": residual}
    found = {name: run(q, k, v, None, causal, precision=name, **change)[0] for name in ("fp32", precision)}
    errors = {name: relative(y, exact) for name, y in found.items()}
    assert TOLERANCE[precision] < errors[precision] < 1.1 * errors["fp32"] + TOLERANCE[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_queries_and_no_keys(precision):
    empty = np.zeros((1, 0, 4), np.float32)
    some = np.ones((1, 40, 4), np.float32)
    assert run(empty, some, some, None, False, precision=precision)[0].shape == (1, 0, 4)
    assert not run(some, empty, empty, None, False, precision=precision)[0].any()


@pytest.mark.parametrize("rows", [1, 5, 23])
def test_few_rows_are_computed_in_float32(rows):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 8), dtype=np.float32) for n in (rows, 100, 100))
    plain = run(q, k, v, None, False)
    for precision in (*PRECISIONS, "auto"):
        np.testing.assert_array_equal(run(q, k, v, None, False, precision=precision), plain)


def test_auto_is_bfloat16():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 64, 8), dtype=np.float32) for _ in range(3))
    np.testing.assert_array_equal(*(run(q, k, v, None, False, precision=p) for p in ("auto", "bf16")))
    equal = np.array_equal(*(run(q, k, v, None, False, precision=p) for p in ("int8", "bf16")))
    assert equal == ("int8" not in _core.precisions())
