"""The noisy probabilities of bench.noise from the density matrices of other packages, each as fast as it lets one ask.

What does not depend on how often they are asked is made beforehand: circuits, devices, amplitudes. All of them take state
vectors and make the density matrices themselves, which costs less than to hand those over. One thread.
"""

import os
from importlib import metadata

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any of them is loaded

import cirq
import numpy as np
import pennylane as qml
from qiskit import QuantumCircuit
from qiskit_aer import AerSimulator
from qiskit_aer.noise import depolarizing_error

from qexport.noise.channels import num_qubits


def aer(p: np.ndarray, level: float):
    """All circuits as one job, in single precision. (One circuit with angles as parameters, bound in the job, would have
    to prepare the rows by gates: six times as long.)"""
    qubits = num_qubits(p.shape[1])
    error = depolarizing_error(level, 1).to_instruction()
    circuits = []
    for amplitudes in np.sqrt(p):
        circuit = QuantumCircuit(qubits)
        circuit.set_statevector(amplitudes)
        for k in range(qubits):
            circuit.append(error, [k])
        circuit.save_probabilities()
        circuits.append(circuit)
    simulator = AerSimulator(method="density_matrix", precision="single", max_parallel_threads=1)

    def call():
        result = simulator.run(circuits, shots=1).result()
        return np.stack([result.data(i)["probabilities"] for i in range(len(circuits))])

    return call


def pennylane(p: np.ndarray, level: float):
    """One circuit, broadcast over the rows, without what gradients need; double precision, there is no other."""
    wires = range(num_qubits(p.shape[1]))
    amplitudes = np.sqrt(p)

    @qml.qnode(qml.device("default.mixed", wires=wires), diff_method=None)
    def circuit(amplitudes):
        qml.StatePrep(amplitudes, wires=wires)
        for wire in wires:
            qml.DepolarizingChannel(0.75 * level, wire)
        return qml.probs(wires=wires)

    return lambda: np.asarray(circuit(amplitudes))


def by_cirq(p: np.ndarray, level: float):
    """A call per row, in single precision; noise on all qubits is one moment of the circuit."""
    qubits = cirq.LineQubit.range(num_qubits(p.shape[1]))
    circuit = cirq.Circuit(cirq.depolarize(0.75 * level).on_each(qubits))
    simulator = cirq.DensityMatrixSimulator(dtype=np.complex64, split_untangled_states=False)
    amplitudes = np.sqrt(p).astype(np.complex64)

    def call():
        found = (simulator.simulate(circuit, initial_state=row, qubit_order=qubits) for row in amplitudes)
        return np.stack([result.final_density_matrix.diagonal().real for result in found])

    return call


PACKAGES = {
    f"{name} {metadata.version(distribution)}": make
    for name, distribution, make in (
        ("Qiskit Aer", "qiskit-aer", aer),
        ("PennyLane", "pennylane", pennylane),
        ("Cirq", "cirq-core", by_cirq),
    )
}
