"""QuantumNoise and QuantumMeasure by their CUDA kernels, against the reference, as on the CPU."""

import itertools

import numpy as np
import pytest
import torch
from calls import measure, noise
from devices import split
from noise_cases import BASES, CHANNELS, TYPES, measure_ref, name_of, noise_binding, parameters, random_kraus, rows
from test_noise_operators import unitary_of
from test_quantum_measure import SHAPES
from test_quantum_noise import TOLERANCE

from qexport.ops.quantum_noise_ref import quantum_noise_ref


def typed_rows(p, dtype):
    return p.astype(TYPES[dtype]).astype(np.float64)


def assert_reference(device, p, given, attributes, dtype):
    """Noisy rows and their leak are the reference's."""
    typed = torch.from_numpy(p).to(getattr(torch, dtype))
    given = {name: value if dtype == "float64" else value.astype(np.float32) for name, value in given.items()}
    want, want_leak = quantum_noise_ref(typed, **given, **attributes)
    noisy, leak = noise(device, typed.double().numpy(), given, attributes, dtype)
    size = max(1.0, float(want.abs().max()))
    assert np.abs(noisy - want.double().numpy()).max() <= 2 * size * TOLERANCE[dtype]
    assert np.abs(leak - want_leak.numpy()).max() <= 2 * size * TOLERANCE["float64" if dtype == "float64" else "float32"]
    return noisy


@pytest.mark.parametrize(
    ("device", "case", "basis", "renormalize", "dtype"),
    split(
        itertools.product(CHANNELS, BASES, (0, 1), TYPES),
        lambda case, basis, renormalize, dtype: dtype == "float32" or (renormalize and case[1]),
    ),
    ids=lambda value: name_of(value) if isinstance(value, tuple) else None,
    indirect=["device"],
)
def test_noise(device, case, basis, renormalize, dtype):
    attributes, per_qubit = case
    p = rows(2, 3, 5, 50)
    p[1, 2, 3] = 0  # a query that attends to nothing
    attributes = {**attributes, "basis": basis, "renormalize": renormalize}
    noisy = assert_reference(device, p, parameters(case[0], per_qubit, 50), attributes, dtype)
    assert not noisy[1, 2, 3].any()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 33, 256, 1000])
def test_noise_of_any_length(device, n, dtype):
    for basis in BASES:
        case = {"channel": "amplitude_damping"}
        given = {"level": np.array(0.3)}
        assert_reference(device, rows(7, n, seed=n), given, {**case, "basis": basis}, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [5000, 70000])
def test_noise_of_long_rows(device, n, dtype):
    """Up to those that no block holds in shared memory; more of them than there are blocks for."""
    given = {"level": np.array(0.3)}
    for basis in BASES:
        assert_reference(device, rows(5, n, seed=n), given, {"channel": "amplitude_damping", "basis": basis}, dtype)
    # Directions out of the plane of X and Z make amplitudes complex; the reference would have a density matrix of so many
    # states, the CPU's kernel does not. That one adds up a leak one by one.
    p, given = typed_rows(rows(5, n, seed=n), dtype), {"level": np.array(1.0), "kraus": random_kraus()}
    for found, want in zip(
        noise(device, p, given, {"channel": "kraus"}, dtype),
        noise_binding(p, given, {"channel": "kraus"}, dtype),
        strict=True,
    ):
        assert np.abs(found - want).max() <= (TOLERANCE[dtype] if found.ndim == 2 else n * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["gate", "whole"])
@pytest.mark.parametrize("channel", ["depolarizing", "amplitude_damping", "phase_damping", "kraus"])
@pytest.mark.parametrize("n", [2, 13, 20, 128])
def test_unitary(device, n, channel, kind, dtype):
    """A gate on every qubit, and a unitary of all of them, behind which each row has a density matrix; 128 states are more
    than a block looks for at once."""
    given = {**parameters({"channel": channel}, True, n), "unitary": unitary_of(kind, n)}
    assert_reference(device, rows(2, 2, n), given, {"channel": channel, "renormalize": 1}, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("basis", BASES)
def test_inverse(device, basis, dtype):
    p = np.eye(50)[[3, 9, 40]] / 2 + np.eye(50)[[7, 9, 41]] / 2
    for more, given in (
        ({"channel": "readout"}, {"level": np.array([[0.125, 0.0625]])}),
        ({"channel": "depolarizing", "scope": "global"}, {"level": np.array(0.25)}),
        ({"channel": "amplitude_damping"}, {"level": np.array([0.125, 0, 0.25, 0.5, 0.0625, 0.25])}),
    ):
        noisy = assert_reference(device, p, given, {"inverse": 1, "basis": basis, **more}, dtype)
        assert noisy.min() < -0.001


@pytest.mark.parametrize("wrong", [-0.5, np.nan, 0.25])
def test_rows_that_are_no_probabilities_become_nan(device, wrong):
    """A kernel cannot raise; other rows are what they are without it."""
    p = rows(4, 8)
    clean = noise(device, p, {"level": np.array(0.1)}, {})[0], measure(device, p, 3, shots=20)
    p[2, 3] = wrong
    for found, expected in zip(
        (noise(device, p, {"level": np.array(0.1)}, {})[0], measure(device, p, 3, shots=20)), clean, strict=True
    ):
        assert np.isnan(found[2]).all()
        np.testing.assert_array_equal(np.delete(found, 2, 0), np.delete(expected, 2, 0))


def test_no_rows(device):
    noisy, leak = noise(device, np.zeros((0, 3, 8)), {"level": np.array(0.1)}, {})
    assert (noisy.shape, leak.shape) == ((0, 3, 8), (0, 3))
    assert measure(device, np.zeros((0, 8)), 0, shots=3).shape == (0, 8)


# What a block asks for with 6000 numbers is below 48 KB, with what its kernel declares it is beyond.
@pytest.mark.parametrize(
    ("device", "shape", "shots", "dtype"),
    split(
        itertools.product((*SHAPES, (3, 6000), (5, 30000)), (1, 4, 37, 1000), TYPES),
        lambda shape, shots, dtype: shots in (1, 1000) if shape[-1] <= 256 else shots == 37 and dtype != "float16",
    ),
    ids=lambda value: str(value) if isinstance(value, tuple) else None,
    indirect=["device"],
)
def test_every_draw_is_that_of_the_reference(device, shape, shots, dtype):
    """The same bits: no tolerance."""
    p = typed_rows(rows(*shape), dtype)
    for seed, layer in ((0, 0), (-(1 << 40) + 5, 3), (1 << 33, 2**32 - 1)):
        want = measure_ref(p, seed, dtype, shots=shots, layer=layer)
        assert np.array_equal(measure(device, p, seed, dtype, shots=shots, layer=layer), want)


def test_zeros_stay_zeros(device):
    p = rows(4, 9)
    p[2] = 0
    got = measure(device, p, 5, shots=64)
    assert not got[2].any()
    assert not got[p == 0].any(), "what is impossible is never found"
    assert np.array_equal(got, measure_ref(p, 5, shots=64))
