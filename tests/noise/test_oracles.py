"""The closed forms against the noise channels of Qiskit Aer and PennyLane: every channel x basis x 1 to 8 qubits, exactly.

Their own simulators get the density matrix of a row, their own channels and, for basis x, their own Hadamard gates.
"""

import functools

import numpy as np
import pennylane as qml
import pytest
import torch
from noise_cases import CHANNELS, name_of, noise_binding, noise_ref, overlap_binding, parameters, rows
from qiskit import QuantumCircuit
from qiskit_aer import AerSimulator
from qiskit_aer.noise import depolarizing_error

from qexport.hardware import pennylane as on_pennylane
from qexport.hardware import qiskit as on_qiskit
from qexport.noise.density import kraus_operators, overlap_probabilities
from qexport.noise.model import NoiseModel

EXACT, SINGLE = 1e-12, 1e-6
# Rows of every number of qubits, most of them with states that stand for nothing.
LENGTHS = {1: (2,), 2: (3, 4), 3: (5, 8), 4: (11, 16), 5: (21, 32), 6: (50, 64), 7: (100,), 8: (200,)}
# Each qubit has parameters of its own; one system of all qubits has one.
CASES = [
    (attributes, per_qubit)
    for attributes, per_qubit in CHANNELS
    if (per_qubit or attributes.get("scope") == "global") and attributes["channel"] in (*on_qiskit.ERRORS, "readout")
]


def by_aer(rho: np.ndarray, models: list[NoiseModel], basis: str) -> np.ndarray:
    """The density matrix behind the channels, and behind Hadamard gates in basis x; our indices are Qiskit's."""
    circuit = QuantumCircuit(rho.shape[-1].bit_length() - 1)
    circuit.set_density_matrix(rho)
    for model in models:
        on_qiskit.add_channel(circuit, model)
    if basis == "x":
        circuit.h(circuit.qubits)
    circuit.save_density_matrix()
    return np.asarray(AerSimulator(method="density_matrix").run(circuit).result().data()["density_matrix"])


def by_pennylane(rho: np.ndarray, models: list[NoiseModel], basis: str) -> np.ndarray:
    """As `by_aer`. PennyLane's first wire is the highest bit: qubit k is wire qubits - 1 - k."""
    qubits = rho.shape[-1].bit_length() - 1
    wires = list(reversed(range(qubits)))

    @qml.qnode(qml.device("default.mixed", wires=qubits))
    def circuit():
        qml.QubitDensityMatrix(rho, range(qubits))
        for model in models:
            on_pennylane.add_channel(model, wires)
        if basis == "x":
            for wire in wires:
                qml.Hadamard(wire)
        on_pennylane.add_readout(models, wires)
        return qml.density_matrix(range(qubits))

    return np.asarray(circuit())


ORACLES = {"aer": (by_aer, 4), "pennylane": (by_pennylane, 3)}  # and the most qubits of noise on all of them as one


def state(p: np.ndarray) -> np.ndarray:
    """sqrt(p) on all states of the register."""
    return np.pad(np.sqrt(p), (0, (1 << (len(p) - 1).bit_length()) - len(p)))


@functools.cache
def noisy(oracle: str, place: int, n: int, basis: str) -> tuple[np.ndarray, dict, np.ndarray]:
    """(row, parameters, density matrix) of a case; basis z serves the overlaps, too."""
    attributes, per_qubit = CASES[place]
    p, given = rows(n, seed=n), parameters(attributes, per_qubit, n, seed=n)
    model = NoiseModel(**attributes, **{name: torch.as_tensor(value) for name, value in given.items()})
    return p, given, ORACLES[oracle][0](np.outer(state(p), state(p)), [model], basis)


def cases(qubits: int, oracle: str):
    for place, (attributes, _) in enumerate(CASES):
        too_large = attributes.get("scope") == "global" and qubits > ORACLES[oracle][1]
        sampled_only = attributes["channel"] == "readout" and oracle == "aer"  # test_hardware.py
        if not too_large and not sampled_only:
            yield place


PLACES = [
    pytest.param(oracle, place, qubits, id=f"{oracle}-{name_of(CASES[place])}-{qubits}")
    for oracle in ORACLES
    for qubits in LENGTHS
    for place in cases(qubits, oracle)
]


@pytest.mark.parametrize("basis", ["z", "x"])
@pytest.mark.parametrize(("oracle", "place", "qubits"), PLACES)
def test_measured_probabilities(oracle, place, qubits, basis):
    for n in LENGTHS[qubits]:
        p, given, rho = noisy(oracle, place, n, basis)
        want, attributes = rho.diagonal().real, {**CASES[place][0], "basis": basis}
        for found, leak in (noise_ref(p[None], given, attributes), noise_binding(p[None], given, attributes)):
            assert np.abs(found[0] - want[:n]).max() <= EXACT
            assert abs(leak[0] - want[n:].sum()) <= EXACT
        found, leak = noise_binding(p[None], given, attributes, "float32")
        assert np.abs(found[0] - want[:n]).max() <= SINGLE
        assert abs(leak[0] - want[n:].sum()) <= SINGLE


@pytest.mark.parametrize(
    ("oracle", "place", "qubits"),
    [p for p in PLACES if CASES[p.values[1]][0]["channel"] != "readout" and CASES[p.values[1]][1]],
)
def test_overlaps(oracle, place, qubits):
    """<b|E(|a><a|)|b> for the state itself and another one."""
    for n in LENGTHS[qubits]:
        p, given, rho = noisy(oracle, place, n, "z")
        attributes = CASES[place][0]
        kraus = kraus_operators(
            attributes["channel"],
            qubits,
            **{name: torch.as_tensor(value) for name, value in given.items()},
            convention=attributes.get("convention", "replace"),
        )
        b = np.stack([state(p), state(rows(n, seed=99))])
        want = np.einsum("ki,ij,kj->k", b, rho, b).real
        found = overlap_probabilities(torch.from_numpy(state(p))[None], torch.from_numpy(b), kraus)[0]
        assert np.abs(found.numpy() - want).max() <= EXACT
        for dtype, most in (("float64", EXACT), ("float32", SINGLE)):
            found = overlap_binding(state(p)[None], b, given, attributes, dtype)[0]
            assert np.abs(found - want).max() <= most


def test_conventions_are_those_of_the_packages():
    """The same number in their own constructors: the share replaced in Aer, the probability of an error in PennyLane."""
    p, level = rows(8), 0.3
    rho = np.outer(state(p), state(p))

    def aer(errors):
        circuit = QuantumCircuit(3)
        circuit.set_density_matrix(rho)
        for error, qubits in errors:
            circuit.append(error.to_instruction(), qubits)
        circuit.save_density_matrix()
        return AerSimulator(method="density_matrix").run(circuit).result().data()["density_matrix"]

    @qml.qnode(qml.device("default.mixed", wires=3))
    def pennylane():
        qml.QubitDensityMatrix(rho, range(3))
        for wire in range(3):
            qml.DepolarizingChannel(level, wire)
        return qml.density_matrix(range(3))

    for attributes, want in (
        ({"convention": "replace"}, aer([(depolarizing_error(level, 1), [k]) for k in range(3)])),
        ({"convention": "replace", "scope": "global"}, aer([(depolarizing_error(level, 3), range(3))])),
        ({"convention": "error"}, pennylane()),
    ):
        found, _ = noise_binding(p[None], {"level": np.array(level)}, attributes)
        assert np.abs(found[0] - np.asarray(want).diagonal().real).max() <= EXACT


@pytest.mark.parametrize("oracle", ORACLES)
def test_channels_one_after_the_other(oracle):
    """In the order they are given: damping and flips do not commute."""
    p = rows(21)
    models = [NoiseModel("amplitude_damping", 0.4), NoiseModel("bit_flip", 0.2), NoiseModel("thermal_relaxation", 0.3)]
    want = ORACLES[oracle][0](np.outer(state(p), state(p)), models, "z").diagonal().real
    found = torch.from_numpy(state(p) ** 2)[None].numpy()
    for model in models:
        given = {name: np.asarray(value) for name, value in model.inputs.items()}
        found, _ = noise_binding(found, given, model.attributes)
    assert np.abs(found[0] - want).max() <= EXACT
