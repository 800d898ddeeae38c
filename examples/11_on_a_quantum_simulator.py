"""Rows of attention on the simulators of Qiskit and PennyLane, with their noise, beside the closed form; and a circuit."""

import torch

from qexport.hardware import to_qasm3
from qexport.hardware.pennylane import PennyLaneBackend
from qexport.hardware.qiskit import QiskitBackend
from qexport.nn import quantum_attention
from qexport.noise.model import NoiseModel
from qexport.ops.quantum_noise_ref import quantum_noise_ref

torch.manual_seed(0)
probabilities = torch.softmax(2 * torch.randn(4, 64), -1)  # of 4 queries over 64 keys: 6 qubits
noise = NoiseModel("thermal_relaxation", 0.1, T1=1.0, T2=0.8)
exact, _ = quantum_noise_ref(probabilities, **noise.inputs, **noise.attributes)
for backend in (QiskitBackend(), PennyLaneBackend()):  # or yours: QiskitBackend(device), PennyLaneBackend(device)
    found = backend.measure_rows(probabilities, 100_000, (noise,), seed=1)
    distance = ((found - exact).abs().sum(-1) / 2).max()
    print(f"{backend.name}: total variation {distance:.4f} from the closed form in 100000 shots")

Q, K, V = (torch.randn(1, 2, 16, 8) for _ in range(3))
output = quantum_attention(Q, K, V, strategy="naive", num_samples=1000, backend="qiskit")
error = (output - quantum_attention(Q, K, V, strategy="exact")).norm() / output.norm()
print(f"attention measured by Qiskit, 1000 shots per query: {error:.1%} off")
print(to_qasm3(probabilities[0, :4] / probabilities[0, :4].sum(), (noise,)))
