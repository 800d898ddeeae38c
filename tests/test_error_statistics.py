"""The statistics behind validate: against scipy and plain formulas, the level and power of the test for bias, padding."""

import numpy as np
import pytest
from bundle_factory import HEADS
from scipy import stats

from qexport.validation.statistics import (
    EXACT,
    SYSTEMATIC,
    TOO_FEW,
    ErrorAccumulator,
    chi2_survival,
    confidence_interval,
    f_survival,
    t_quantile,
)
from qexport.validation.unpadded import as_floats, by_head, keep_masks, padded_axis, rows


def test_distributions_against_scipy():
    for freedom in (1, 2.5, 30, 1e4):
        for x in (0.01, 0.5, 1, 1.1, 2, 10):
            x = freedom * x
            assert chi2_survival(x, freedom) == pytest.approx(stats.chi2.sf(x, freedom), rel=1e-9, abs=1e-13)
    for k1 in (1, 2.5, 30, 1e3, 1e5):
        for k2 in (1, 4, 40, 4e3, 4e5):
            for f in (0.01, 0.9, 1, 1.01, 1.5, 3, 20):
                assert f_survival(f, k1, k2) == pytest.approx(stats.f.sf(f, k1, k2), abs=1e-8)
    for freedom in (1, 2, 4, 30, 1000):
        assert t_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)
    values = np.array([1.0, 2.0, 4.0, 4.5])
    expected = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert confidence_interval(values) == pytest.approx(expected)
    assert confidence_interval([1.0]) is None


def accumulate(baseline, values, batches=1, **options) -> ErrorAccumulator:
    """An accumulator over (runs, elements) values, fed in several batches."""
    accumulator = ErrorAccumulator(len(values), **options)
    for part in np.array_split(np.arange(baseline.shape[-1]), batches):
        accumulator.add(baseline[..., part], [value[..., part] for value in values])
    return accumulator


def test_metrics_against_plain_formulas():
    rng = np.random.default_rng(0)
    c = rng.standard_normal(500)
    y = c + 0.1 * rng.standard_normal((6, 500)) + 0.05
    metrics = accumulate(c, y, batches=7).metrics(rounding=1e-6)
    errors = np.linalg.norm(y - c, axis=1) / np.linalg.norm(c)
    assert metrics["relative_error"] == pytest.approx(errors.mean(), rel=1e-12)
    assert metrics["relative_error_per_seed"] == pytest.approx(errors, rel=1e-12)
    cosines = y @ c / np.linalg.norm(y, axis=1) / np.linalg.norm(c)
    assert metrics["cosine"] == pytest.approx(cosines.mean(), rel=1e-12)
    assert metrics["max_abs_error"] == pytest.approx(np.abs(y - c).max(), rel=1e-12)
    variance = y.var(axis=0, ddof=1).sum()
    bias_sq = ((y.mean(axis=0) - c) ** 2).sum() - variance / 6
    assert metrics["bias"]["relative_bias"] == pytest.approx(np.sqrt(bias_sq) / np.linalg.norm(c), rel=1e-9)
    assert metrics["bias"]["relative_std"] == pytest.approx(np.sqrt(variance) / np.linalg.norm(c), rel=1e-9)


@pytest.mark.parametrize("spectrum", [0, 0.5, 1])
@pytest.mark.parametrize("elements", [1, 3, 1000])
@pytest.mark.parametrize("seeds", [4, 5, 20])
def test_unbiased_noise_is_called_systematic_at_its_level_only(spectrum, elements, seeds):
    """H0 holds: of T repetitions, Binomial(T, level) are called systematic. The reference distribution is an approximation,
    allowed to miss its level by a factor 2; bound by 4 sigma of that. The eigenvalues of the noise's covariance fall off
    as i^(-2 spectrum): an F test of the means, or Student's t of the products alone, misses by factors of 5 to 19 here."""
    rng = np.random.default_rng([int(2 * spectrum), elements, seeds])
    level, repetitions, called = 0.01, 1000, 0
    scale = 0.1 * np.arange(1, elements + 1.0) ** -spectrum
    c = 10 * rng.standard_normal(elements)
    for _ in range(repetitions):
        y = c + rng.standard_normal((seeds, elements)) * scale
        called += accumulate(c, y).bias(1e-9, level)["verdict"] == SYSTEMATIC
    assert called <= repetitions * 2 * level + 4 * np.sqrt(repetitions * 2 * level)


@pytest.mark.parametrize("spectrum", [0, 0.5])
def test_five_seeds_see_a_bias_as_large_as_the_noise(spectrum):
    rng = np.random.default_rng(7)
    scale = np.arange(1, 1001.0) ** -spectrum
    bias = np.sqrt((scale**2).mean())
    c = 100 * rng.standard_normal(1000)
    verdicts = [
        accumulate(c, c + bias + rng.standard_normal((5, 1000)) * scale).bias(1e-9, 0.01 / 6)["verdict"] for _ in range(50)
    ]
    assert verdicts.count(SYSTEMATIC) >= 35


@pytest.mark.parametrize("elements", [1, 40, 1000])
def test_a_bias_is_called_systematic(elements):
    rng = np.random.default_rng(elements)
    c = 10 * rng.standard_normal(elements)
    y = c + 0.1 * rng.standard_normal((8, elements)) + 0.3
    bias = accumulate(c, y).bias(1e-9, 0.01)
    assert bias["verdict"] == SYSTEMATIC
    assert bias["relative_bias"] == pytest.approx(0.3 * np.sqrt(elements) / np.linalg.norm(c), rel=0.3)


def test_verdicts_at_the_edges():
    c = np.linspace(1, 2, 50)
    assert accumulate(c, [c] * 4).bias(1e-6)["verdict"] == EXACT
    assert accumulate(c, [c + 0.1] * 4).bias(1e-6)["verdict"] == SYSTEMATIC
    assert accumulate(c, [c + 0.1, c - 0.1, c]).bias(1e-6)["verdict"] == TOO_FEW
    broken = accumulate(c, [c, c + np.nan, c]).metrics(1e-6)
    assert broken["bias"]["verdict"] == SYSTEMATIC
    assert not broken["relative_error"] <= 1e9  # NaN must never look small
    assert np.isnan(broken["max_abs_error"])
    zeros = accumulate(np.zeros(5), [np.zeros(5)] * 3).metrics(1e-6)
    assert (zeros["relative_error"], zeros["cosine"]) == (0, 1)
    assert accumulate(np.zeros(5), [np.ones(5)] * 3).metrics(1e-6)["relative_error"] == np.inf


def test_chunks_do_not_change_the_figures(monkeypatch):
    rng = np.random.default_rng(0)
    c, y = rng.standard_normal((3, 50)), rng.standard_normal((2, 3, 50))
    whole = accumulate(c, y, heads=3).metrics(1e-6)
    monkeypatch.setattr("qexport.validation.statistics.CHUNK", 21)
    chunked = accumulate(c, y, heads=3).metrics(1e-6)
    assert chunked["elements"] == whole["elements"] == 150
    assert chunked["relative_error_per_seed"] == pytest.approx(whole["relative_error_per_seed"], rel=1e-12)
    assert chunked["worst_head"]["relative_error"] == pytest.approx(whole["worst_head"]["relative_error"], rel=1e-12)


def test_the_worst_head():
    c = np.ones((3, 10))
    y = c + np.array([0.1, 0.5, 0.2])[:, None]
    metrics = accumulate(c, [y, y], heads=3).metrics(1e-6)
    assert metrics["worst_head"] == {"head": 1, "relative_error": pytest.approx(0.5)}


# Padded positions.


def mask_spec(*shape, dtype="int64"):
    return {"name": "m", "kind": "mask", "shape": list(shape), "dtype": dtype}


def test_padding_is_found_by_name_and_by_size():
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    masks = keep_masks({"inputs": [mask_spec("batch", "sequence")]}, {"m": mask})
    axis, keep = padded_axis((2, 5, 3), ["batch", 5, "sequence"], masks)
    assert axis == 2
    np.testing.assert_array_equal(keep, mask.astype(bool))
    assert padded_axis((2, 4, 3, 8), [None] * 4, masks)[0] == 2
    assert padded_axis((2, 3, 8), None, masks)[0] == 1
    assert padded_axis((2, 3), None, masks) is None  # (batch, features) must not be taken for (batch, positions)
    assert padded_axis((2, 3), ["batch", "sequence"], masks)[0] == 1
    assert padded_axis((2, 7, 8), None, masks) is None
    decoder = {"name": "d", "kind": "token_ids", "shape": ["batch", "decoder_sequence"], "dtype": "int64"}
    masks = keep_masks({"inputs": [decoder, mask_spec("batch", "sequence")]}, {"m": mask})
    assert padded_axis((2, 3, 8), ["batch", "decoder_sequence", 8], masks) is None
    assert (
        padded_axis((2, 3, 8), ["batch", "Addlogits_dim_1", 8], masks)[0] == 1
    )  # as an exporter calls what it does not know
    additive = keep_masks({"inputs": [mask_spec("b", "s", dtype="float32")]}, {"m": np.array([[0, -1e9]], np.float32)})
    np.testing.assert_array_equal(additive[0][1], [[True, False]])


def test_rows_and_heads_agree_for_both_layouts():
    rng = np.random.default_rng(0)
    four = rng.standard_normal((2, HEADS, 3, 8))  # (batch, heads, positions, head_size)
    three = four.transpose(0, 2, 1, 3).reshape(2, 3, HEADS * 8)
    mask = np.array([[True, True, False], [True, False, False]])
    for padded4, padded3 in ((None, None), ((2, mask), (1, mask))):
        a, b = by_head(four, HEADS, padded4), by_head(three, HEADS, padded3)
        assert a.shape == b.shape == (HEADS, (3 if padded4 else 6) * 8)
        np.testing.assert_array_equal(np.sort(a, axis=1), np.sort(b, axis=1))
    assert rows(three, (1, mask)).shape == (3, HEADS * 8)


def test_integer_outputs_count_what_differs():
    base = np.array([1, 2, 3, 4])
    accumulator = ErrorAccumulator(1)
    accumulator.add(*as_floats(base, [np.array([1, 2, 3, 5])]))
    assert accumulator.relative_errors()[0] == pytest.approx(0.5)
