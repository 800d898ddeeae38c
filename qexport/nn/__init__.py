"""Torch modules: sampled attention as a drop-in for nn.MultiheadAttention, and in place of the attention of other models."""

from qexport.nn.backends import AttentionCall, backend_names
from qexport.nn.functional import exact_attention, quantum_attention
from qexport.nn.mps import AttentionMPS, MatrixProductStateSimulator, MPSReport
from qexport.nn.multihead import QuantumMultiheadAttention, number_layers
from qexport.nn.noise import quantum_measure, quantum_noise, quantum_overlap
from qexport.nn.replacement import replace_attention
from qexport.nn.simulator import QuantumAttentionSimulator

__all__ = [
    "AttentionCall",
    "AttentionMPS",
    "MPSReport",
    "MatrixProductStateSimulator",
    "QuantumAttentionSimulator",
    "QuantumMultiheadAttention",
    "backend_names",
    "exact_attention",
    "number_layers",
    "quantum_attention",
    "quantum_measure",
    "quantum_noise",
    "quantum_overlap",
    "replace_attention",
]
