"""Rows of attention as circuits: measured on simulators and devices of other packages, or written as OpenQASM 3.

The backends are in `qexport.hardware.qiskit` and `qexport.hardware.pennylane`, which need those packages; the circuit does
not (docs/noise.md, "On hardware").
"""

from qexport.hardware.qasm import to_qasm3

__all__ = ["to_qasm3"]
