"""Decoding from a key_summary with a word on its error: the estimate, the tolerance, the correction of the output."""

import numpy as np
import pytest
import torch
from instruction_sets import ISAS, run_on
from summary_cases import TYPES, cache, queries, relative, step, zeros

from qexport.ops.key_summary import fields
from qexport.ops.quantum_attention_ref import quantum_attention_ref

LONG = 4300  # keys, enough for a tolerance of 0.1 and more
CASES = {
    "none": {"residual": "none"},
    "unbiased": {"residual": "unbiased", "left_window_size": 3000},
    "james_stein": {"residual": "james_stein", "softcap": 4.0},
    "one budget per head": {"residual": "james_stein", "num_samples": [16, 64, 300, 4096]},
    "tolerance": {"residual": "none", "error_tolerance": 0.15},
    "tolerance, james_stein": {"residual": "james_stein", "error_tolerance": 0.15},
}


def rough(seed, dtype="float32", **sizes):
    """A cache and queries whose heads are far from alike in how well means do for them: the values of head h are noise to a
    share that grows with h."""
    k, v = (x.astype(np.float32) for x in cache(seed, n=LONG, **sizes))
    share = np.linspace(0.0, 1.0, v.shape[1])[None, :, None, None]
    v = v + 4 * share * np.random.default_rng([seed, 2]).standard_normal(v.shape).astype(np.float32)
    return k.astype(TYPES[dtype]), v.astype(TYPES[dtype])


def row_errors(y, exact):
    """Relative error of each head, (batch, heads)."""
    y, exact = y.astype(np.float64), exact.astype(np.float64)
    return np.linalg.norm(y - exact, axis=(2, 3)) / np.linalg.norm(exact, axis=(2, 3))


def check_against_the_reference(case, dtype="float32", step=step, tolerances=(5e-6, 5e-4, 4e-3)):
    """The reference starts from the same state. Returns how many heads were sampled and how many were not."""
    k, v = rough(20, batch=2, dtype=dtype)
    q = (0.5 * queries(20, k, 4, rows=2).astype(np.float32)).astype(k.dtype)
    nonpad = [LONG, LONG - 700]
    change = CASES[case]
    y, estimate, summary = step(q, k, v, nonpad, zeros(k, v), seed=5, layer=3, error_estimate=True, **change)
    tensors = (torch.from_numpy(x.astype(np.float64)) for x in (q, k, v))
    state = {"nonpad_kv_seqlen": torch.tensor(nonpad), "key_summary": torch.from_numpy(summary), "seed": 5}
    attributes = {"strategy": "tree", "num_samples": [128], "is_causal": 1, "layer": 3} | change
    reference = quantum_attention_ref(*tensors, **state, **attributes)
    tolerance = tolerances[list(TYPES).index(dtype)]
    np.testing.assert_allclose(y.astype(np.float64), reference[0].numpy(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(estimate, reference[4].numpy(), rtol=2e-3, atol=1e-6)
    return int((estimate > 0).sum()), int((estimate == 0).sum())


@pytest.mark.parametrize("case", CASES)
def test_output_and_estimate_are_those_of_the_formulas(case):
    sampled, exact = check_against_the_reference(case)
    assert sampled > 0
    assert (exact > 0) == ("tolerance" in case or "budget" in case)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types(dtype):
    assert check_against_the_reference("james_stein", dtype)[0] > 0


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_has_the_formulas(isa):
    code = "import test_decode_error as t; print(len([t.check_against_the_reference(case) for case in t.CASES]))"
    assert int(run_on(isa, code)) == len(CASES)


@pytest.mark.parametrize("residual", ["none", "unbiased", "james_stein"])
def test_the_estimate_is_the_error(residual):
    """Over the draws, the mean of the squared estimate against the mean of the squared error, head by head. Too high it may
    be: errors of clusters are taken for somewhat alike, and the values of the last heads are independent noise."""
    k, v = rough(21, kv_heads=8)
    q = 0.5 * queries(21, k, 8)
    exact = step(q, k, v, [LONG])[0]
    state, squares = zeros(k, v), []
    for seed in range(60):
        y, estimate, state = step(q, k, v, [LONG], state, seed=seed, error_estimate=True, residual=residual)
        squares.append((estimate**2, row_errors(y, exact) ** 2))
    ratio = np.sqrt(np.divide(*np.mean(squares, 0)))
    assert ratio.min() > 1 / 1.5, ratio
    assert ratio.max() < 3, ratio


def test_unbiased_is_unbiased():
    """The mean of n draws lies within three standard errors of the exact output, but for what is of second order."""
    k, v = rough(22, kv_heads=4)
    q = 0.5 * queries(22, k, 4)
    exact = step(q, k, v, [LONG])[0]
    without, _, state = step(q, k, v, [LONG], zeros(k, v), residual="none")
    draws = np.stack([step(q, k, v, [LONG], state, seed=seed, residual="unbiased")[0] for seed in range(200)])
    standard_error = np.linalg.norm(draws.std(0) / np.sqrt(len(draws)), axis=-1)
    off, biased = (np.linalg.norm(x - exact, axis=-1) for x in (draws.mean(0), without))
    assert (off < 3 * standard_error + 0.05 * biased).all(), (off, standard_error, biased)
    assert (biased > 3 * standard_error + 0.05 * biased).any(), "without the correction the test would pass as well"


def test_james_stein_makes_the_error_smaller():
    k, v = rough(23, kv_heads=8)
    q = 0.5 * queries(23, k, 8)
    exact = step(q, k, v, [LONG])[0]
    state, squares = zeros(k, v), {"none": [], "james_stein": []}
    for residual, found in squares.items():
        for seed in range(20):
            y, _, state = step(q, k, v, [LONG], state, seed=seed, residual=residual)
            found.append(row_errors(y, exact) ** 2)
    assert np.mean(squares["james_stein"]) < np.mean(squares["none"])


def test_on_noise_the_error_is_not_understated():
    """Nothing can be estimated there: the draw is shrunk to nearly nothing, and a tolerance leads to all keys."""
    k, v = np.random.default_rng(33).standard_normal((2, 1, 8, LONG, 32), dtype=np.float32)
    q = queries(33, k, 8)
    exact = step(q, k, v, [LONG])[0]
    without, said, state = step(q, k, v, [LONG], zeros(k, v), error_estimate=True, residual="none")
    shrunk, also_said, _ = step(q, k, v, [LONG], state, error_estimate=True, residual="james_stein")
    drawn = step(q, k, v, [LONG], state, residual="unbiased")[0]
    assert (said >= row_errors(without, exact)).mean() > 0.8
    assert (also_said >= row_errors(shrunk, exact)).mean() > 0.8
    assert row_errors(shrunk, exact).mean() < 0.5 * row_errors(drawn, exact).mean()
    exact_bits(step(q, k, v, [LONG], state, error_estimate=True, error_tolerance=0.1), exact)


@pytest.mark.parametrize(("residual", "kept"), [("none", 0.95), ("james_stein", 0.9)])
@pytest.mark.parametrize("tolerance", [0.1, 0.2])
def test_heads_keep_the_tolerance(tolerance, residual, kept):
    k, v = rough(24, kv_heads=16)
    q = 0.5 * queries(24, k, 16)
    exact = step(q, k, v, [LONG])[0]
    state, errors, estimates = zeros(k, v), [], []
    for seed in range(8):
        options = {"seed": seed, "error_estimate": True, "residual": residual, "error_tolerance": tolerance}
        y, estimate, state = step(q, k, v, [LONG], state, **options)
        errors.append(row_errors(y, exact))
        estimates.append(estimate)
    errors, estimates = np.array(errors), np.array(estimates)
    assert (estimates <= 0.8 * tolerance).all()
    assert (errors[estimates == 0] < 1e-5).all()
    assert 0.1 < np.mean(estimates == 0) < 0.9, "some heads are easy and some are not"
    assert np.mean(errors <= tolerance) >= kept
    free = row_errors(step(q, k, v, [LONG], state, residual=residual)[0], exact)
    assert np.mean(free <= tolerance) < kept


def test_more_is_read_until_the_tolerance_is_kept():
    """A head that settles for twice or four times the budget says what that budget says."""
    k, v = rough(25, kv_heads=16)
    q = 0.5 * queries(25, k, 16)
    options = {"error_estimate": True, "residual": "none"}
    state = step(q, k, v, [LONG], zeros(k, v))[2]
    by_budget = {n: step(q, k, v, [LONG], state, num_samples=[n])[0][0, :, 0] for n in (256, 512, 1024)}
    settled = []
    for tolerance in np.linspace(0.1, 0.4, 7):
        y, estimate, _ = step(q, k, v, [LONG], state, error_tolerance=float(tolerance), **options)
        for h in np.flatnonzero(estimate[0] > 0):
            same = [n for n, found in by_budget.items() if np.allclose(y[0, h, 0], found[h], rtol=1e-5, atol=1e-6)]
            assert same, (tolerance, h)
            settled += same
    assert 256 in settled
    assert max(settled) > 256


def exact_bits(found, exact):
    np.testing.assert_array_equal(found[0], exact)
    np.testing.assert_array_equal(found[1], 0)


def test_where_trying_does_not_pay_a_step_is_exact():
    k, v = cache(26, n=LONG)
    q = queries(26, k, 4)
    state = zeros(k, v)
    for nonpad, tolerance in ((LONG, 0.05), (LONG, 0.01), (3999, 0.5)):
        exact = step(q, k, v, [nonpad])[0]
        assert relative(step(q, k, v, [nonpad], state)[0], exact) > 1e-3
        exact_bits(step(q, k, v, [nonpad], state, error_estimate=True, error_tolerance=tolerance), exact)
    # a quarter of the clusters is more than such a budget may be
    exact_bits(
        step(q, k, v, [LONG], state, error_estimate=True, error_tolerance=1.0, num_samples=[1100]), step(q, k, v, [LONG])[0]
    )


def test_any_tolerance_up_to_one():
    k, v = rough(27)
    q = queries(27, k, 4)
    exact = step(q, k, v, [LONG])[0]
    y, estimate, _ = step(q, k, v, [LONG], zeros(k, v), error_tolerance=1.0, error_estimate=True)
    assert (estimate <= 0.8).all()
    assert (row_errors(y, exact) <= 1).all()


def test_first_steps_and_masks_are_exact():
    k, v = cache(28, n=LONG)
    q = queries(28, k, 4)
    for change in ({}, {"error_tolerance": 0.2}, {"residual": "james_stein"}):
        for nonpad in (1, 16, 300, 527):
            y, estimate, _ = step(q, k, v, [nonpad], zeros(k, v), error_estimate=True, **change)
            np.testing.assert_allclose(y, step(q, k, v, [nonpad])[0], atol=2e-6)
            np.testing.assert_array_equal(estimate, 0)
        mask = np.random.default_rng(0).random((1, 1, 1, LONG)) < 0.9
        found = step(q, k, v, [LONG], zeros(k, v), mask=mask, error_estimate=True, **change)
        exact_bits(found, step(q, k, v, [LONG], mask=mask)[0])


def test_neither_threads_nor_other_heads_change_bits():
    k, v = rough(29, batch=2, kv_heads=6)
    q = 0.5 * queries(29, k, 12)
    nonpad, options = [LONG, LONG - 600], {"error_tolerance": 0.15, "error_estimate": True, "residual": "james_stein"}
    one = step(q, k, v, nonpad, zeros(k, v), **options)
    assert 0 < np.mean(one[1] == 0) < 1
    for threads in (2, 5):
        for found, expected in zip(step(q, k, v, nonpad, zeros(k, v), threads=threads, **options), one, strict=True):
            np.testing.assert_array_equal(found, expected)
    alone = step(q[:, :4], k[:, :2], v[:, :2], nonpad, zeros(k[:, :2], v), **options)
    np.testing.assert_array_equal(alone[0][0], one[0][0, :4])
    exact = step(q, k, v, nonpad)[0]
    np.testing.assert_array_equal(one[0][one[1] == 0], exact[one[1] == 0])


def test_seed_layer_and_position_change_the_draw():
    k, v = rough(30)
    q = queries(30, k, 4)
    state = step(q, k, v, [LONG], zeros(k, v))[2]
    estimates = [
        step(q, k, v, [nonpad], state, error_estimate=True, seed=seed, layer=layer)[1]
        for seed, layer, nonpad in ((0, 0, LONG), (1, 0, LONG), (0, 1, LONG), (0, 0, LONG - 1), (0, 0, LONG))
    ]
    for other in estimates[1:4]:
        assert (other != estimates[0]).all()
    np.testing.assert_array_equal(estimates[4], estimates[0])


def test_keys_that_are_all_alike_have_no_error():
    k, v = cache(31, n=LONG)
    k[:], v[:] = k[:, :, :1], v[:, :, :1]
    q = queries(31, k, 4)
    y, estimate, _ = step(q, k, v, [LONG], zeros(k, v), error_estimate=True, error_tolerance=0.1)
    np.testing.assert_allclose(y, np.broadcast_to(v.repeat(2, 1)[:, :, :1], y.shape), rtol=1e-5)
    assert estimate.max() < 1e-4


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 1e38, -7.5])
def test_a_spoilt_summary_does_no_harm_beyond_its_head(wrong):
    k, v = rough(32, kv_heads=2)
    q = queries(32, k, 4)
    state = step(q, k, v, [LONG], zeros(k, v))[2]
    options = {"error_tolerance": 0.2, "error_estimate": True, "residual": "james_stein"}
    clean = step(q, k, v, [LONG], state, **options)
    for name, part in fields(state, k.shape[-1], v.shape[-1]).items():
        if name != "keys":
            part[:, 0] = wrong
    found = step(q, k, v, [LONG], state, **options)
    np.testing.assert_array_equal(found[0][:, 2:], clean[0][:, 2:])
