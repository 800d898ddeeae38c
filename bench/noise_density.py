"""Kraus operators and unitaries in QuantumNoise, beside qiskit-aer's density matrices: the table `kraus` of `bench.noise`.

Channels of single qubits, and gates behind them, are measured in closed form: O(d log d) a row of d = 2^q. A unitary of all
qubits takes a density matrix: 16 complex multiply-adds for each of its d^2 elements and q qubits, and d^2 / 2 for each of d
outcomes, since it is Hermitian; the latter alone are 2 d^3 multiply-adds of real numbers a row, 0.5 million at q = 6 and
2.1 thousand million at q = 10.

Aer works as its documentation recommends for speed: set_statevector gives it the row (set_density_matrix takes longer to
hand over), one job runs the circuits of all rows, save_probabilities takes the result, nothing is sampled, and circuits are
built outside of the time. Of its settings, single or double precision and with or without fusion of gates, whichever is
fastest in a first run of each is timed, in turns with ours, on as many threads.
"""

import numpy as np

from qexport.ops.proto import make_node
from qexport.profiling.timing import interleaved

OPERATORS = 3
LARGEST_ERROR = 1e-6


def isometry(rows: int, columns: int, seed: int) -> np.ndarray:
    """A random complex matrix with orthonormal columns."""
    parts = np.random.default_rng(seed).standard_normal((2, rows, columns))
    return np.linalg.qr(parts[0] + 1j * parts[1])[0]


def in_parts(matrices: np.ndarray) -> np.ndarray:
    """float32, real and imaginary parts on the last axis."""
    return np.stack([matrices.real, matrices.imag], -1).astype(np.float32)


def aer_jobs(p: np.ndarray, kraus: np.ndarray, unitary: np.ndarray | None, threads: int) -> list:
    """Calls that return the probabilities of all rows, one per setting of Aer."""
    from qiskit import QuantumCircuit
    from qiskit.quantum_info import Kraus
    from qiskit_aer import AerSimulator

    qubits = p.shape[-1].bit_length() - 1
    channel = Kraus(list(kraus)).to_instruction()
    circuits = []
    for row in np.sqrt(p.astype(np.float64)):
        circuit = QuantumCircuit(qubits)
        circuit.set_statevector(row / np.linalg.norm(row))
        for k in range(qubits):
            circuit.append(channel, [k])
        if unitary is not None and len(unitary) == 2:
            for k in range(qubits):
                circuit.unitary(unitary, [k])
        elif unitary is not None:
            circuit.unitary(unitary, range(qubits))
        circuit.save_probabilities()
        circuits.append(circuit)

    def job(precision, fusion):
        simulator = AerSimulator(
            method="density_matrix", precision=precision, fusion_enable=fusion, max_parallel_threads=threads
        )

        def call():
            result = simulator.run(circuits, shots=1).result()
            return np.stack([result.data(i)["probabilities"] for i in range(len(circuits))])

        return call

    return [job(precision, fusion) for precision in ("single", "double") for fusion in (True, False)]


def kraus_table(bound, probabilities, threads: int, runs: int) -> list[dict]:
    """Rows of the table. `bound` and `probabilities` are those of `bench.noise`; `runs` rounds at 6 qubits, fewer at 10."""
    rows = []
    for qubits, count in ((6, 64), (10, 1)):
        n = 1 << qubits
        p = probabilities(n)[:count]
        kraus = isometry(2 * OPERATORS, 2, 1).reshape(OPERATORS, 2, 2)
        for what, unitary in (("channel", None), ("gate", isometry(2, 2, 2)), ("unitary", isometry(n, n, 3))):
            inputs = {"level": np.array(1, np.float32), "kraus": in_parts(kraus)}
            names = ["p", "level", "", "", "", "kraus"]
            if unitary is not None:
                inputs["unitary"] = in_parts(unitary)
                names.append("unitary")
            output = np.zeros_like(p)
            node = make_node("QuantumNoise", names, ["y"], channel="kraus")
            ours = bound([node], {"p": p}, output, inputs, threads)
            took = [(interleaved({"aer": job}, 1, warmup=1)["aer"][0], job) for job in aer_jobs(p, kraus, unitary, threads)]
            fastest = min(took, key=lambda one: one[0])[1]
            ours()
            error = float(np.abs(output - fastest()).max())
            if not error <= LARGEST_ERROR:
                raise SystemExit(f"QuantumNoise with {what} differs from Aer by {error:.3g}, allowed is {LARGEST_ERROR:g}")
            times = interleaved({"ours": ours, "aer": fastest}, runs if qubits < 10 else max(3, runs // 8))
            us, aer_ms = 1e3 * float(np.median(times["ours"])), float(np.median(times["aer"]))
            row = {"kraus": what, "qubits": qubits, "rows": count, "error": error, "p50_us": us, "aer_ms": aer_ms}
            rows.append(row | {"x_aer": 1e3 * aer_ms / us})
    return rows
