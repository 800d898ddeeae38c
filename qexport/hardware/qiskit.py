"""Rows measured by Qiskit: on Aer with its own noise channels, or on any device or sampler of Qiskit's interface."""

import functools

import numpy as np
import torch

from qexport.hardware.circuit import preparation
from qexport.hardware.noise import qubit_parameters
from qexport.hardware.rows import RowBackend, check_size
from qexport.noise.channels import global_share, transition_matrices
from qexport.noise.model import NoiseModel

try:
    from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
    from qiskit.circuit import ParameterVector
    from qiskit.primitives import BackendSamplerV2
    from qiskit.transpiler import generate_preset_pass_manager
    from qiskit_aer import noise as aer
    from qiskit_aer.primitives import SamplerV2 as AerSampler
except ImportError as error:
    raise ImportError(f"{error}; pip install 'qexport[qiskit]'") from error


class QiskitBackend(RowBackend):
    """Rows measured by Qiskit.

    Without arguments on Aer: its density matrix method where there is noise, else its state vector. As entry point `qiskit`
    of the group `qexport.backends` it is known to `quantum_attention` and to the simulator; another one with your device
    can be registered there under a name of its own.

        service = QiskitRuntimeService()  # of qiskit-ibm-runtime, with your account
        device = service.least_busy(operational=True, simulator=False)
        backend = QiskitBackend(device, SamplerV2(mode=device))

    Args:
        device: a `qiskit.providers.BackendV2`, which circuits are transpiled for.
        sampler: a SamplerV2 that runs them; by default `BackendSamplerV2(backend=device)`, which needs a device with `run`.
            Without a device it gets circuits of RY, CX, H and measurements as they are.
    """

    name = "qiskit"

    def __init__(self, device=None, sampler=None):
        self.device = sampler if device is None else device
        self._sampler = BackendSamplerV2(backend=device) if sampler is None and device is not None else sampler
        self._passes = None if device is None else generate_preset_pass_manager(optimization_level=3, backend=device)
        self._ready = functools.cache(self._transpiled)  # one circuit per length and basis serves all rows

    def _frequencies(self, qubits, angles, shots, noise, basis, seed):
        sampler = self._sampler
        if sampler is None:
            options = {"method": "density_matrix" if noise else "statevector"}
            if any(model.channel == "readout" for model in noise):
                options["noise_model"] = readout_noise(noise, qubits)
            sampler = AerSampler(seed=seed, options={"backend_options": options})
        circuit = row_circuit(qubits, noise, basis) if noise else self._ready(qubits, basis)
        (result,) = sampler.run([(circuit, angles)], shots=shots).result()
        outcomes = np.zeros(result.data.outcome.array.shape[:-1], np.int64)  # (rows, shots), from bytes, the highest first
        for place in range(result.data.outcome.array.shape[-1]):
            outcomes = outcomes << 8 | result.data.outcome.array[..., place]
        outcomes += np.arange(len(outcomes))[:, None] << qubits
        return np.bincount(outcomes.ravel(), minlength=len(outcomes) << qubits).reshape(len(outcomes), -1) / shots

    def _transpiled(self, qubits, basis):
        if self._passes is not None:
            check_size(qubits, self.device.num_qubits)
        circuit = row_circuit(qubits, (), basis)
        return circuit if self._passes is None else self._passes.run(circuit)


def row_circuit(qubits: int, noise: tuple[NoiseModel, ...] = (), basis: str = "z") -> QuantumCircuit:
    """The circuit of rows, with the angles of `qexport.hardware.circuit.rotations` as parameters, measured into a register
    `outcome`. Readout noise is no part of a circuit in Aer: `readout_noise`."""
    register, outcome = QuantumRegister(qubits), ClassicalRegister(qubits, "outcome")
    circuit = QuantumCircuit(register, outcome)
    angles = ParameterVector("angle", (1 << qubits) - 1)
    for target, angle, control in preparation(qubits):
        if control is None:
            circuit.ry(angles[angle], target)
        else:
            circuit.cx(control, target)
    for model in noise:
        add_channel(circuit, model)
    if basis == "x":
        circuit.h(register)
    circuit.measure(register, outcome)
    return circuit


ERRORS = {
    "depolarizing": lambda share: aer.depolarizing_error(share, 1),
    "amplitude_damping": aer.amplitude_damping_error,
    "phase_damping": aer.phase_damping_error,
    "thermal_relaxation": lambda time, T1, T2, excited: aer.thermal_relaxation_error(T1, T2, time, excited),
    "bit_flip": lambda level: aer.pauli_error([("X", level), ("I", 1 - level)]),
    "phase_flip": lambda level: aer.pauli_error([("Z", level), ("I", 1 - level)]),
}


def add_channel(circuit: QuantumCircuit, model: NoiseModel) -> None:
    """Append a model as Aer's own error, to every qubit or to all as one; nothing for readout."""
    qubits = circuit.num_qubits
    if model.scope == "global":
        error = aer.depolarizing_error(float(global_share(model.convention, model.level, qubits)), qubits)
        circuit.append(error.to_instruction(), range(qubits))
    elif model.channel != "readout":
        for k, parameters in enumerate(qubit_parameters(model, qubits)):
            circuit.append(ERRORS[model.channel](*parameters).to_instruction(), [k])


def readout_noise(noise: tuple[NoiseModel, ...], qubits: int) -> aer.NoiseModel:
    """Aer's noise model with the readout errors among `noise`."""
    matrices = torch.eye(2, dtype=torch.float64).expand(qubits, 2, 2)
    for model in noise:
        if model.channel == "readout":
            matrices = transition_matrices("readout", qubits, model.level) @ matrices
    found = aer.NoiseModel()
    for k, matrix in enumerate(matrices):
        found.add_readout_error(aer.ReadoutError(matrix.T.tolist()), [k])
    return found


backend = QiskitBackend()
