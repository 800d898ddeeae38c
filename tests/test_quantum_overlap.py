"""QuantumOverlap: kernel against reference on every instruction set, its fallback, and what is refused."""

import numpy as np
import pytest
import torch
from instruction_sets import ISAS, run_on
from noise_cases import CHANNELS as NOISE_CHANNELS
from noise_cases import OVERLAP_PARAMETERS as PARAMETERS
from noise_cases import name_of, overlap_binding, parameters, random_kraus, run_node

from qexport import _core
from qexport.noise import density
from qexport.noise.channels import num_qubits
from qexport.ops import QUANTUM_OVERLAP
from qexport.ops.quantum_overlap_ref import quantum_overlap_ref

CHANNELS = tuple(case for case in NOISE_CHANNELS if case[0]["channel"] != "readout")
EXACT = 1e-12
TOLERANCE = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3, "float64": EXACT}


def vectors(*shape: int, seed: int = 0) -> np.ndarray:
    """Rows of any norm and sign; the second of three or more is zeros."""
    rows = np.random.default_rng(seed).standard_normal(shape) * 3
    if shape[-2] > 2:
        rows[..., 1, :] = 0
    return rows


def overlap_ref(queries, keys, given: dict, attributes: dict) -> np.ndarray:
    inputs = [torch.from_numpy(x) for x in (queries, keys)]
    return quantum_overlap_ref(*inputs, *(given.get(name) for name in PARAMETERS), **attributes).double().numpy()


def overlap_ort(queries, keys, given: dict, attributes: dict, dtype: str = "float64", threads: int = 1, fallback=False):
    feeds = {"queries": queries.astype(np.float64), "keys": keys.astype(np.float64)}
    feeds |= {name: np.asarray(given[name], np.float64) for name in PARAMETERS if name in given}
    parameter = "float64" if dtype == "float64" else "float32"
    types = {name: dtype if name in ("queries", "keys") else parameter for name in feeds}
    return run_node("QuantumOverlap", feeds, types, ("overlaps",), attributes, threads, fallback)[0]


BACKENDS = {"binding": overlap_binding, "ort": overlap_ort}
RUNS = (overlap_ref, overlap_binding, overlap_ort)


@pytest.mark.parametrize("case", CHANNELS, ids=name_of)
@pytest.mark.parametrize("size", [2, 3, 4, 7, 8, 16, 21, 50, 64, 128])
def test_kernel_is_the_reference(case, size):
    """In closed form for dephasing, by density matrices for all others, whose populations change."""
    attributes, per_qubit = case
    queries, keys = vectors(3, size, seed=1), vectors(37, size, seed=2)
    given = parameters(attributes, per_qubit, size, seed=size)
    want = overlap_ref(queries, keys, given, attributes)
    assert want[[0, 2]].max() > 0.5 / size
    for run in RUNS[1:]:
        got = run(queries, keys, given, attributes)
        assert np.abs(got - want).max() <= EXACT, run.__name__
        assert not got[1].any()
        assert not got[:, 1].any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CHANNELS, ids=name_of)
def test_other_types(case, backend, dtype):
    attributes, per_qubit = case
    queries, keys = (torch.from_numpy(vectors(2, 3, k, 50, seed=k)).to(getattr(torch, dtype)) for k in (5, 9))
    given = {name: value.astype(np.float32) for name, value in parameters(attributes, per_qubit, 50).items()}
    want = quantum_overlap_ref(queries.double(), keys.double(), *(given.get(name) for name in PARAMETERS), **attributes)
    got = BACKENDS[backend](queries.double().numpy(), keys.double().numpy(), given, attributes, dtype)
    assert got.shape == (2, 3, 5, 9)
    assert np.abs(got - want.numpy()).max() <= TOLERANCE[dtype]


ON_AN_ISA = """
from test_quantum_overlap import *
for case in CHANNELS:
    for size in (2, 4, 8, 16, 50, 128):
        test_kernel_is_the_reference(case, size)
    test_other_types(case, "binding", "float32")
print("done")
"""


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees(isa):
    assert run_on(isa, ON_AN_ISA) == "done\n"


@pytest.mark.parametrize("run", RUNS)
def test_global_noise_mixes_in_one_over_all_states(run):
    queries, keys = vectors(2, 5), vectors(2, 5, seed=1)
    clean = run(queries, keys, {"level": np.array(0.0)}, {"scope": "global"})
    cosine = (queries @ keys.T) / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(keys, axis=1)
    assert np.abs(clean - cosine**2).max() <= EXACT
    noisy = run(queries, keys, {"level": np.array(0.25)}, {"scope": "global"})
    assert np.abs(noisy - (0.75 * clean + 0.25 / 8)).max() <= EXACT


@pytest.mark.parametrize("run", RUNS)
def test_phases_of_kraus_operators_count(run):
    """Diagonal operators with phases have complex factors: no real closed form, but a density matrix that is as simple."""
    angles = np.random.default_rng(0).uniform(0, 6, (3, 3, 2))
    operators = np.zeros((3, 3, 2, 2), complex)
    operators[..., [0, 1], [0, 1]] = np.exp(1j * angles) / 3**0.5
    queries, keys = vectors(2, 8), vectors(2, 8, seed=1)
    diagonals = operators.diagonal(axis1=-2, axis2=-1)
    factors = np.einsum("qai,qaj->qij", diagonals, diagonals.conj())
    whole = np.kron(np.kron(factors[2], factors[1]), factors[0])
    w = np.einsum("mj,kj->mkj", *(x / np.linalg.norm(x, axis=1)[:, None] for x in (queries, keys)))
    want = np.einsum("mki,ij,mkj->mk", w, whole, w).real
    kraus = np.stack([operators.real, operators.imag], -1)
    got = run(queries, keys, {"level": np.array(1.0), "kraus": kraus}, {"channel": "kraus"})
    assert np.abs(got - want).max() <= EXACT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channel", ["phase_flip", "amplitude_damping", "kraus"])
def test_threads_do_not_change_the_result(backend, channel):
    queries, keys = vectors(2, 64, 64), vectors(2, 64, 64, seed=1)
    given = parameters({"channel": channel}, False, 64)
    one = BACKENDS[backend](queries, keys, given, {"channel": channel}, threads=1)
    assert np.array_equal(one, BACKENDS[backend](queries, keys, given, {"channel": channel}, threads=3))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_fallback_is_the_overlap_without_noise(dtype):
    queries, keys = vectors(2, 3, 21), vectors(2, 4, 21, seed=1)
    got = overlap_ort(queries, keys, {"level": np.array(0.3)}, {}, dtype, fallback=True)
    clean = overlap_ort(queries, keys, {"level": np.array(0.0)}, {}, dtype)
    assert np.abs(got - clean).max() <= TOLERANCE[dtype]
    assert not got[:, 1].any()
    assert np.abs(overlap_ort(queries, keys, {"level": np.array(0.3)}, {}, dtype) - clean).max() > 0.01


@pytest.mark.parametrize("run", RUNS[1:])
def test_nothing_to_compare(run):
    for m, k in ((0, 3), (3, 0)):
        assert run(np.ones((m, 4)), np.ones((k, 4)), {"level": np.array(0.1)}, {}).shape == (m, k)


@pytest.mark.parametrize("run", RUNS)
def test_rows_of_any_size_are_states(run):
    """Their norm does not count, as far as the type reaches."""
    queries, keys = vectors(2, 8), vectors(2, 8, seed=1)
    want = run(queries, keys, {"level": np.array(0.1)}, {})
    for scale in (1e-100, 1e100):
        assert np.abs(run(queries * scale, keys / scale, {"level": np.array(0.1)}, {}) - want).max() <= EXACT


ROWS = np.ones((2, 8))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("queries", "keys", "given", "attributes", "message"),
    [
        (
            ROWS,
            ROWS[:, :4],
            {"level": 0.1},
            {},
            r"keys have shape \(2, 4\), expected that of the queries, \(2, 8\), but for",
        ),
        (ROWS, ROWS[None], {"level": 0.1}, {}, r"keys have shape \(1, 2, 8\), expected that of the queries, \(2, 8\)"),
        (ROWS[0], ROWS, {"level": 0.1}, {}, r"queries must have 2 to 4 dimensions, got 1"),
        (ROWS[:, :1], ROWS[:, :1], {"level": 0.1}, {}, r"queries must have rows of >= 2 numbers, got 1"),
        (ROWS, ROWS, {"level": 0.1}, {"channel": "readout"}, r"channel must be one of depolarizing, .*flip, kraus, got"),
        (
            ROWS,
            ROWS,
            {"level": 0.1},
            {"channel": "bit_flip", "scope": "global"},
            r"scope must be local with channel bit_flip",
        ),
    ],
)
def test_what_is_refused(run, queries, keys, given, attributes, message):
    given = {name: np.asarray(value, np.float64) for name, value in given.items()}
    with pytest.raises(Exception, match=rf"\[QuantumOverlap\] {message}") as raised:
        run(queries, keys, given, attributes)
    assert "\n" not in str(raised.value).strip()


@pytest.mark.parametrize(
    ("given", "attributes", "message"),
    [
        ({"level": 1.5}, {}, r"level must be in 0 to 1\.33333 with convention replace on 1 qubit, got 1\.5"),
        ({"level": [0.1, 0.2, 0.1]}, {"scope": "global"}, r"level must be one number with scope global"),
        ({"level": 0.1, "T1": 1.0}, {}, r"T1 is for channel thermal_relaxation, got depolarizing; leave it out"),
        ({"level": 0.1}, {"channel": "thermal_relaxation"}, r"T1 is missing; thermal_relaxation needs it"),
        ({"level": 0.1}, {"channel": "kraus"}, r"kraus is missing; channel kraus needs it"),
        (
            {"level": 0.1, "kraus": 2 * random_kraus()},
            {"channel": "kraus"},
            r"Kraus operators must sum .*, they are off by 3",
        ),
    ],
)
def test_channels_are_checked_as_those_of_noise(given, attributes, message):
    """By the same code, under the name of this op."""
    given = {name: np.asarray(value, np.float64) for name, value in given.items()}
    for run in RUNS[1:]:
        with pytest.raises(Exception, match=rf"\[QuantumOverlap\] {message}"):
            run(ROWS, ROWS, given, attributes)
    with pytest.raises(Exception, match=message):
        overlap_ref(ROWS, ROWS, given, attributes)


def test_the_kernel_checks_attributes_and_types_too():
    resolved = QUANTUM_OVERLAP.resolve({})
    with pytest.raises(ValueError, match=r"\[QuantumOverlap\] channel must be one of depolarizing, .*, got 'readout'"):
        _core.quantum_overlap(ROWS, ROWS, 0.1, **resolved | {"channel": "readout"})
    with pytest.raises(ValueError, match=r"\[QuantumOverlap\] keys must be of the type of queries"):
        _core.quantum_overlap(ROWS, ROWS.astype(np.float32), 0.1, **resolved)
    with pytest.raises(ValueError, match=r"a density matrix, which takes 268 MB .*, got 13; phase_damping and"):
        _core.quantum_overlap(np.ones((1, 4097)), np.ones((1, 4097)), 0.1, **resolved)
    flips = _core.quantum_overlap(np.ones((1, 8192)), np.ones((1, 8192)), 0.5, **resolved | {"channel": "phase_flip"})
    assert abs(flips[0, 0] - 2.0**-13) <= EXACT


def test_operators_of_the_reference_are_those_of_its_qubits():
    """Of the density matrix, by the whole matrices: qubit k is bit k of the index."""
    a, b = (vectors(2, 4, seed=s) for s in (1, 2))
    level = torch.tensor([0.1, 0.7])
    first, second = density.kraus_operators("amplitude_damping", num_qubits(4), level)
    one, other = (torch.from_numpy(x[0] / np.linalg.norm(x[0])).to(torch.complex128) for x in (a, b))
    want = sum(abs(torch.dot(other, torch.kron(x, y) @ one)) ** 2 for x in second for y in first)
    got = overlap_binding(a, b, {"level": level.numpy()}, {"channel": "amplitude_damping"})
    assert abs(got[0, 0] - want) <= EXACT
