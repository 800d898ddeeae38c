"""Attention as a matrix product state: what that saves against the dense matrix, what is refused, and what a train tells."""

import torch

from qexport.errors import QexportError
from qexport.nn import MatrixProductStateSimulator

n = 512
place = torch.arange(n, dtype=torch.float64) - n / 2
Q = torch.stack([place, torch.ones(n)], -1) * 2**0.5 / 25  # softmax(Q K^T / sqrt(2)) ~ exp(-(i - j)^2 / 50)
K = torch.stack([place, -place.square() / 2], -1)
V = torch.randn(n, 64, dtype=torch.float64)

mps_sim = MatrixProductStateSimulator(max_bond_dim=32)
mps_tensors = mps_sim.encode_attention_mps(Q, K, V)
output = mps_sim.mps_attention_forward(mps_tensors, V)
report = mps_tensors.report
print(f"attention by distance: {report.compression:.0f} times fewer bytes than the dense matrix, {report.layout} sites")
print(f"error of the output {report.output_error:.1e}; {report.cost.reason}")
print("bits of entanglement:", " ".join(f"{bits:.2f}" for bits in mps_sim.entanglement_entropy(mps_tensors)))
print("measured (query, key):", mps_sim.sample_attention(Q, K, shots=4, seed=7).tolist())
try:
    mps_sim.encode_attention_mps(*torch.randn(3, n, 64))
except QexportError as error:
    print(error)
