"""Rows measured by PennyLane: on its mixed-state simulator with its own noise channels, or on any device of its kind."""

import numpy as np

from qexport.hardware.circuit import preparation
from qexport.hardware.noise import qubit_parameters
from qexport.hardware.rows import RowBackend, check_size
from qexport.noise.channels import global_share
from qexport.noise.density import PAULIS, kraus_operators
from qexport.noise.model import NoiseModel

try:
    import pennylane as qml
except ImportError as error:
    raise ImportError(f"{error}; pip install 'qexport[pennylane]'") from error

BATCH_BYTES = 1 << 28  # of the states of rows that are simulated together


class PennyLaneBackend(RowBackend):
    """Rows measured by PennyLane.

    Without arguments on `default.mixed` where there is noise, else on `default.qubit`. As entry point `pennylane` of the
    group `qexport.backends` it is known to `quantum_attention` and to the simulator; another one with your device can be
    registered there under a name of its own.

        backend = PennyLaneBackend(qml.device("qiskit.remote", wires=6, backend=...))  # of pennylane-qiskit

    Args:
        device: a device of PennyLane; rows take its first wires.
    """

    name = "pennylane"

    def __init__(self, device=None):
        self.device = device

    def _frequencies(self, qubits, angles, shots, noise, basis, seed):
        device = self.device
        if device is None:
            device = qml.device("default.mixed" if noise else "default.qubit", wires=qubits, seed=seed)
        wires = list(device.wires or range(qubits))[:qubits]
        check_size(qubits, len(wires))

        def measured(part):
            row_circuit(part, wires, noise, basis)
            return qml.probs(wires=wires[::-1])  # PennyLane's first wire is the highest bit

        measure = qml.set_shots(qml.QNode(measured, device), shots)
        together = max(1, BATCH_BYTES >> (4 + qubits * (2 if noise else 1)))
        parts = [angles[start : start + together] for start in range(0, len(angles), together)]
        return np.concatenate([np.reshape(measure(part), (len(part), -1)) for part in parts])


def row_circuit(angles: np.ndarray, wires: list, noise: tuple[NoiseModel, ...] = (), basis: str = "z"):
    """Queue the circuit of rows with the angles (rows, 2^qubits - 1) of `qexport.hardware.circuit.rotations`, up to their
    measurement; wires[k] is qubit k."""
    for target, angle, control in preparation(len(wires)):
        if control is None:
            qml.RY(angles[:, angle], wires[target])
        else:
            qml.CNOT([wires[control], wires[target]])
    for model in noise:
        add_channel(model, wires)
    if basis == "x":
        for wire in wires:
            qml.Hadamard(wire)
    add_readout(noise, wires)


CHANNELS = {
    "depolarizing": lambda share, wires: qml.DepolarizingChannel(0.75 * share, wires),  # the probability of an error
    "amplitude_damping": qml.AmplitudeDamping,
    "phase_damping": qml.PhaseDamping,
    "thermal_relaxation": lambda time, T1, T2, excited, wires: qml.ThermalRelaxationError(excited, T1, T2, time, wires),
    "bit_flip": qml.BitFlip,
    "phase_flip": qml.PhaseFlip,
}


def add_channel(model: NoiseModel, wires: list) -> None:
    """Queue a model as PennyLane's own channel, on every wire or on all as one; nothing for readout."""
    if model.scope == "global":
        share, size = float(global_share(model.convention, model.level, len(wires))), 4 ** len(wires)
        # Of the 4^qubits Pauli strings the identity keeps what the others leave.
        weights = np.full(size, share / size)
        weights[0] = max(0.0, 1 - share * (size - 1) / size)
        strings = [np.eye(1)]
        for _ in wires:
            strings = [np.kron(string, pauli) for string in strings for pauli in PAULIS.numpy()]
        qml.QubitChannel([np.sqrt(w) * s for w, s in zip(weights, strings, strict=True)], wires)
    elif model.channel != "readout":
        for wire, parameters in zip(wires, qubit_parameters(model, len(wires)), strict=True):
            CHANNELS[model.channel](*parameters, wires=wire)


def add_readout(noise: tuple[NoiseModel, ...], wires: list) -> None:
    """Queue readout noise as a measurement of each wire, |i><j| with the probability that j is read as i: PennyLane has
    errors of readout on simulators of its own alone, the same for all wires."""
    for model in noise:
        if model.channel == "readout":
            for wire, operators in zip(wires, kraus_operators("readout", len(wires), model.level), strict=True):
                qml.QubitChannel(list(operators.numpy()), wire)


backend = PennyLaneBackend()
