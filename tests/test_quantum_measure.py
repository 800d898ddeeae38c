"""QuantumMeasure: the draws are those of the reference, those of `naive` attention, and follow their distribution."""

import numpy as np
import pytest
from noise_cases import TYPES, measure_binding, measure_ort, measure_ref, rows
from scipy.stats import chi2

from qexport import _core
from qexport.errors import UsageError
from qexport.ops import QUANTUM_ATTENTION, QUANTUM_MEASURE

BACKENDS = {"binding": measure_binding, "ort": measure_ort}
SHAPES = ((5,), (3, 1), (4, 7), (2, 3, 16), (2, 3, 4, 50))


def rounded(p: np.ndarray, dtype: str) -> np.ndarray:
    return p.astype(TYPES[dtype]).astype(np.float64)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shots", [1, 4, 37, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_draw_is_that_of_the_reference(shape, shots, backend, dtype):
    """The same bits: no tolerance."""
    p = rounded(rows(*shape), dtype)
    for seed, layer in ((0, 0), (-(1 << 40) + 5, 3), (1 << 33, 2**32 - 1)):
        want = measure_ref(p, seed, dtype, shots=shots, layer=layer)
        assert np.array_equal(BACKENDS[backend](p, seed, dtype, shots=shots, layer=layer), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_stay_zeros(backend):
    p = rows(4, 9)
    p[2] = 0
    got = BACKENDS[backend](p, 5, shots=64)
    assert not got[2].any()
    np.testing.assert_allclose(np.delete(got, 2, 0).sum(-1), 1)
    assert not got[p == 0].any(), "what is impossible is never found"
    assert np.array_equal(got, measure_ref(p, 5, shots=64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_do_not_change_the_draws(backend):
    p = rows(3, 101, 300)
    one = BACKENDS[backend](p, 5, shots=100, threads=1)
    for threads in (2, 3):
        assert np.array_equal(BACKENDS[backend](p, 5, shots=100, threads=threads), one)


def test_frequencies_times_values_are_naive_attention():
    """At the same seed and layer, up to edges of the distribution that float32 moves."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 3, 40, 8)).astype(np.float32) for _ in range(3))
    attributes = QUANTUM_ATTENTION.resolve({"strategy": "naive", "num_samples": 16, "control_variate": 0, "layer": 4})
    y = _core.quantum_attention(q, k, v, seed=9, **{n: a for n, a in attributes.items() if a is not None})[0]
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(np.float32(8))
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    got = measure_binding(p, 9, "float32", shots=16, layer=4) @ v
    # An edge of the distribution is off by at most about keys * 2^-22 of it, and one of 16 draws falls there by that chance.
    mean = 2 * 3 * 40 * 16 * 40 * 2.0**-22
    assert (np.abs(got - y).max(-1) > 1e-5).sum() <= mean + 5 * mean**0.5


def test_draws_follow_their_distribution():
    """Chi-square over independent rows: the null hypothesis is that outcome j has probability p_j."""
    p, shots = (rows(200, 33, seed=1) + 1 / 33) / 2, 20000
    observed = measure_binding(p, 0, shots=shots) * shots
    expected = p * shots
    assert expected.min() > 100, "the statistic follows chi-square"
    freedom = p.size - len(p)
    assert chi2.sf(((observed - expected) ** 2 / expected).sum(), freedom) > 1e-3
    skewed = expected * np.linspace(0.97, 1.03, 33)  # what the test would see if draws were off by 3 %
    assert chi2.sf(((observed - skewed) ** 2 / skewed).sum(), freedom) < 1e-3


def test_variance_of_the_frequencies():
    """E sum_j (f_j - p_j)^2 = (1 - sum p^2) / shots, over independent rows alike, within five standard errors."""
    p, shots = rows(1, 40, seed=2).repeat(20000, 0), 32
    squares = ((measure_binding(p, 1, shots=shots) - p) ** 2).sum(-1)
    theory = (1 - (p[0] ** 2).sum()) / shots
    bound = 5 * squares.std(ddof=1) / len(squares) ** 0.5
    assert bound < 0.05 * theory, "the test is sharp enough for 5 %"
    assert abs(squares.mean() - theory) < bound


def test_seed_layer_row_and_query_choose_the_draws():
    p = np.full((2, 2, 2, 16), 1 / 16)
    one = measure_binding(p, 1, shots=64)
    assert np.array_equal(one, measure_binding(p, 1, shots=64))
    for other in (measure_binding(p, 2, shots=64), measure_binding(p, 1 + (1 << 32), shots=64)):
        assert not np.array_equal(one, other)
    assert not np.array_equal(one, measure_binding(p, 1, shots=64, layer=1))
    assert len({row.tobytes() for row in one.reshape(-1, 16)}) == 8


def test_fallback_measures_for_ever():
    p = rows(2, 3, 8)
    assert np.array_equal(measure_ort(p, 1, "float32", fallback=True, shots=3), rounded(p, "float32"))


def test_seed_is_zero_when_absent():
    p = rows(3, 8)
    attributes = QUANTUM_MEASURE.resolve({"shots": 9})
    assert np.array_equal(_core.quantum_measure(p, **attributes), measure_ref(p, 0, shots=9))


GOOD = rows(4, 8)


@pytest.mark.parametrize("run", [measure_ref, measure_binding, measure_ort])
@pytest.mark.parametrize(
    ("p", "attributes", "message"),
    [
        (-GOOD, {}, r"probabilities must be >= 0, got -.* at place 0 of row 0"),
        (
            GOOD * [[1], [1], [1.5], [1]],
            {},
            r"probabilities must sum to 1 within 1e-09, row 2 is off by 0\.5; divide it by its sum",
        ),
        (np.ones((3, 0)), {}, r"probabilities must have rows of >= 1 numbers, got rows of 0"),
        (GOOD, {"shots": 0}, r"shots must be >= 1, got 0"),
        (GOOD, {"shots": 2**31}, r"shots must be <= 2147483647, got 2147483648"),
        (GOOD, {"layer": -1}, r"layer must be >= 0, got -1"),
    ],
)
def test_what_is_refused(run, p, attributes, message):
    with pytest.raises(Exception, match=rf"\[QuantumMeasure\] {message}") as raised:
        run(p, 0, **attributes)
    assert "\n" not in str(raised.value).strip()


def test_the_kernel_checks_attributes_too():
    for change, message in (
        ({"shots": 0}, "shots must be in 1 to 2147483647, got 0"),
        ({"layer": -1}, "layer must be in 0 to"),
    ):
        with pytest.raises(ValueError, match=rf"\[QuantumMeasure\] {message}"):
            _core.quantum_measure(GOOD, **QUANTUM_MEASURE.resolve({}) | change)
    with pytest.raises(UsageError, match="no attribute 'samples'"):
        QUANTUM_MEASURE.resolve({"samples": 3})
