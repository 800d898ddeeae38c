"""Weights as whole numbers and as low-rank factors: against loops, onnxruntime's own kernels and an SVD."""

import math

import numpy as np
import pytest
from compression_cases import correlated, model_of, random, run

from qexport.compression.lowrank import factor, spectrum
from qexport.compression.quantize import DAMPING, error_passing, quantize

SHAPES = [(64, 48), (97, 61), (127, 131), (3, 2)]
RUNTIME = '<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>'


def gram(X):
    return X.astype(np.float64).T @ X


def seen(X, W) -> float:
    """|X W|^2."""
    return float(np.square(X.astype(np.float64) @ W).sum())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_number_has_the_nearest_code_of_its_block(shape, block, bits):
    W = random(*shape)
    found = quantize(W, bits, block)
    codes, zero, top = np.arange(2**bits, dtype=np.float32), 2 ** (bits - 1), 2**bits - 1
    assert found.scales.shape == (-(-shape[0] // block), shape[1])
    assert found.codes.max() <= top
    dense = found.dense()
    for k in range(shape[0]):
        for n in range(shape[1]):
            step = np.float32(found.scales[k // block, n])
            grid = (codes - zero) * step
            assert dense[k, n] == (np.float32(found.codes[k, n]) - zero) * step
            assert abs(W[k, n] - dense[k, n]) <= np.abs(W[k, n] - grid).min() * (1 + 1e-5)
    # no scale is worse than the one that just reaches the largest number with the code 0
    for start in range(0, shape[0], block):
        part = W[start : start + block]
        largest = part[np.abs(part).argmax(0), np.arange(shape[1])]
        step = (-largest / zero).astype(np.float16).astype(np.float32)
        plain = (np.clip(np.rint(part / step) + zero, 0, top) - zero) * step
        error = np.square(part - dense[start : start + block]).sum(0)
        assert (error <= np.square(part - plain).sum(0) * (1 + 1e-5)).all()


def test_a_few_large_numbers_are_clipped_where_that_pays():
    """One number of 1 among 127 of 0.06: at 4 bits a step of 1/8 loses all of them, one of 0.7/8 keeps most."""
    W = np.full((128, 1), 0.06, np.float32)
    W[5] = 1
    found = quantize(W, 4, 128)
    assert np.abs(found.scales).max() < 1 / 8
    assert np.square(W - found.dense()).sum() < 127 * 0.06**2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_onnxruntime_multiplies_with_what_dense_says(shape, bits):
    found = quantize(random(*shape), bits, 32)
    model = model_of(
        f"""{RUNTIME} g (float[m,{shape[0]}] x) => (float[m,{shape[1]}] y) {{
        y = com.microsoft.MatMulNBits<K={shape[0]}, N={shape[1]}, bits={bits}, block_size=32>(x, codes, scales) }}""",
        {"codes": found.packed(), "scales": found.scales.T.astype(np.float32).reshape(-1)},
    )
    np.testing.assert_array_equal(run(model, {"x": np.eye(shape[0], dtype=np.float32)}), found.dense())
    assert found.nbytes == found.packed().nbytes + found.scales.nbytes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64])
def test_onnxruntime_picks_what_dense_says(block, bits):
    found = quantize(random(128, 61), bits, block)
    model = model_of(
        f"""{RUNTIME} g (int64[m] i) => (float[m,128] y) {{ y = com.microsoft.GatherBlockQuantized
        <bits={bits}, block_size={block}, gather_axis=0, quantize_axis=1>(codes, i, scales) }}""",
        {"codes": found.packed().reshape(61, -1), "scales": np.ascontiguousarray(found.scales.T.astype(np.float32))},
    )
    picked = np.array([60, 0, 7, 7])
    np.testing.assert_array_equal(run(model, {"i": picked}), found.dense().T[picked])


def test_numbers_beyond_float16_are_clipped_and_none_is_nan(recwarn):
    W = random(64, 8)
    W[3, 2] = 1e9
    found = quantize(W, 8, 32)
    assert np.isfinite(found.dense()).all()
    assert found.dense()[3, 2] == 128 * float(np.finfo(np.float16).max)
    assert not recwarn.list
    for W in (np.zeros((64, 8), np.float32), np.full((64, 8), 1e-30, np.float32)):
        assert not quantize(W, 4, 32).dense().any()


@pytest.mark.parametrize("size", [1, 40, 64, 129])  # in one piece, in halves, in halves of halves that differ
def test_error_passing_is_the_factor_of_the_inverse(size):
    G = gram(correlated(300, size))
    U = error_passing(G).astype(np.float64)
    damped = G + DAMPING * np.trace(G) / size * np.eye(size)
    np.testing.assert_allclose(U.T @ U, np.linalg.inv(damped), rtol=0, atol=1e-5 / np.linalg.eigvalsh(damped).min())
    assert np.abs(np.tril(U, -1)).max() < 1e-9 * np.abs(U).max()
    assert np.isfinite(error_passing(np.zeros((4, 4)))).all()
    assert np.isfinite(error_passing(gram(correlated(3, 40)))).all()  # fewer samples than inputs


@pytest.mark.parametrize("block", [32, 128])
def test_passed_errors_cost_the_outputs_what_theory_says(block):
    """A rounding error is even in [-1/2, 1/2] steps: variance 1/12. Rounding each number by itself makes |X (W - W')|^2 =
    tr(G) / 12 steps^2 in each column, passing errors on sum_k D_k / 12, with D_k what the inputs behind input k leave
    unexplained of it. The square of an error varies by sqrt(0.8) of its mean, so a sum over n columns by at most
    sqrt(0.8 / n) of it: four of these are allowed."""
    X, W = correlated(600, 96), random(96, 400)
    G = gram(X)
    damped = G + DAMPING * np.trace(G) / 96 * np.eye(96)
    left = np.array([1 / np.linalg.inv(damped[k:, k:])[0, 0] for k in range(96)])
    slack = 1 + 4 * math.sqrt(0.8 / 400)
    plain, passed = (quantize(W, 8, block, passing) for passing in (None, error_passing(G)))
    steps = np.repeat(np.square(passed.scales.astype(np.float64)), block, axis=0)[:96]
    found = seen(X, W - passed.dense())
    assert found <= slack * float((left[:, None] * steps).sum()) / 12
    share = left.sum() / np.trace(G)
    assert share < 0.25
    assert found <= slack**2 * share * seen(X, W - plain.dense())
    assert seen(X, W - quantize(W, 4, block, error_passing(G)).dense()) < seen(X, W - quantize(W, 4, block).dense()) / 2


def test_errors_are_passed_on_to_every_row_behind():
    """Against a loop in float64, row by row: a number within rounding of the middle between two codes may differ, with all
    that is behind it in its column, which is rarer than one column in a hundred."""
    X, W = correlated(600, 200, 0.99), random(200, 300)
    passing = error_passing(gram(X))
    found = quantize(W, 4, 32, passing)
    weights, U = W.astype(np.float64), passing.astype(np.float64)
    codes = np.empty_like(found.codes)
    for k in range(200):
        step = found.scales[k // 32].astype(np.float64)
        codes[k] = np.clip(np.rint(weights[k] / step) + 8, 0, 15)
        error = (weights[k] - (codes[k] - 8.0) * step) / U[k, k]
        weights[k + 1 :] -= np.outer(U[k, k + 1 :], error)
    assert (codes == found.codes).all(0).mean() > 0.99


@pytest.mark.parametrize(("rows", "columns", "samples"), [(48, 32, 200), (32, 48, 200), (61, 97, 300), (40, 40, 7)])
def test_the_spectrum_tells_what_each_rank_loses(rows, columns, samples):
    X, W = correlated(samples, rows), random(rows, columns)
    G, total = gram(X), seen(X, W)
    found = spectrum(W, G)
    errors = found.errors()
    assert len(errors) == min(rows, columns) + 1
    assert errors[0] == pytest.approx(1)
    # where the root of G is taken, as much is added to it for its sake
    added = DAMPING**2 * np.trace(G) / rows * float(np.square(W).sum()) / total if columns > rows else 0
    for rank in (1, 5, 17, min(rows, columns)):
        V = found.vectors[:, :rank]
        assert errors[rank] == pytest.approx(seen(X, W - W @ V @ V.T) / total, rel=1e-6, abs=1e-9 + added)
    if samples > rows:
        values = np.square(np.linalg.svd(np.linalg.cholesky(G).T @ W, compute_uv=False))
        tails = np.append(np.cumsum(values[::-1])[::-1], 0) / total
        np.testing.assert_allclose(errors, tails, rtol=1e-6, atol=1e-9 + added)


def test_spectra_of_zero_and_rank_deficient_weights(recwarn):
    G = gram(correlated(200, 48))
    for shape in ((48, 32), (48, 80)):
        empty = spectrum(np.zeros(shape, np.float32), G)
        assert not empty.errors().any()
        made = factor(np.zeros(shape, np.float32), G, empty, 32, 8, 32, error_passing(G))
        assert made.dense().shape == shape
        assert not made.dense().any()
        W = random(48, 5) @ random(5, shape[1], seed=1)
        found = spectrum(W, G)
        assert found.errors()[4] > 1e-3
        assert found.errors()[5] < 1e-9
        made = factor(W, G, found, 32, 8, 32, error_passing(G))
        change = np.square(np.linalg.cholesky(G).T @ (W - made.dense())).sum() / found.total
        assert change <= 2 * (1 / 127) ** 2  # two factors of 8 bits
    assert not recwarn.list


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (131, 127)])
def test_factors_lose_no_less_than_their_rank_and_no_more_than_rank_and_rounding(shape, bits):
    X, W = correlated(500, shape[0]), random(*shape)
    G, passing, total = gram(X), error_passing(gram(X)), seen(X, W)
    found = spectrum(W, G)
    made = factor(W, G, found, 32, bits, 32, passing)
    assert (made.rank, made.dense().shape) == (32, shape)
    error = seen(X, W - made.dense()) / total
    best = np.square(np.linalg.svd(np.linalg.cholesky(G).T @ W, compute_uv=False)[32:]).sum() / total
    rounding = seen(X, W - quantize(W, bits, 32).dense()) / total
    assert best * (1 - 1e-6) <= error <= best + 2 * rounding  # one for each factor
    assert made.nbytes == made.left.nbytes + made.right.nbytes


def test_a_table_counts_its_entries_by_how_often_they_are_picked():
    W = random(80, 48)
    counts = np.random.default_rng(2).integers(1, 9, 80).astype(np.float64)
    found = spectrum(W, counts)
    np.testing.assert_allclose(found.errors(), spectrum(W, np.diag(counts)).errors(), rtol=1e-6, atol=1e-9)
    made = factor(W, counts, found, 32, 8, 32, None)
    assert made.dense().shape == (48, 80)
    error = float(counts @ np.square(W - made.dense().T).sum(1)) / float(counts @ np.square(W).sum(1))
    rounding = float(counts @ np.square(W - quantize(W.T, 8, 32).dense().T).sum(1)) / float(counts @ np.square(W).sum(1))
    assert found.errors()[32] * (1 - 1e-6) <= error <= found.errors()[32] + 2 * rounding
