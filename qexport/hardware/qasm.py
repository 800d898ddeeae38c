"""The circuit of a row as OpenQASM 3 text, which any tool that reads it can run."""

import torch

from qexport.hardware.circuit import preparation, rotations
from qexport.hardware.noise import check_noise
from qexport.hardware.rows import check_basis, checked_rows
from qexport.noise.channels import num_qubits
from qexport.noise.model import NoiseModel, as_models


def to_qasm3(probabilities: torch.Tensor, noise: tuple[NoiseModel, ...] = (), *, basis: str = "z") -> str:
    """The circuit that measures a row of probabilities, as OpenQASM 3.

    Qubit and bit k are bit k of the outcome. Noise is written as comments at its place, since the language has no form for
    it that tools agree on: whoever runs the file gets the noise of the machine.

    Args:
        probabilities: (n,), n >= 2, sums to one.
        noise: models, in the order they act.
        basis: `z`, or `x` for a Hadamard gate on every qubit before the measurement.

    Returns:
        The text of a program with registers `q` and `c`.

    Raises:
        UsageError: no single row of probabilities, or noise or a basis that is refused.
    """
    check_basis(basis)
    row = checked_rows(probabilities, least=2, axes=1)
    qubits = num_qubits(len(row))
    noise = as_models(noise)
    check_noise(noise, qubits)
    angles = rotations(row).tolist()
    lines = ["OPENQASM 3.0;", 'include "stdgates.inc";', f"qubit[{qubits}] q;", f"bit[{qubits}] c;"]
    for target, angle, control in preparation(qubits):
        lines.append(f"ry({angles[angle]!r}) q[{target}];" if control is None else f"cx q[{control}], q[{target}];")
    lines += [f"// noise on every qubit: {_words(model)}" for model in noise if model.channel != "readout"]
    lines += ["h q;"] if basis == "x" else []
    lines += ["c = measure q;"]
    lines += [f"// wrong outcomes: {_words(model)}" for model in noise if model.channel == "readout"]
    return "\n".join(lines) + "\n"


def _words(model: NoiseModel) -> str:
    names = model.attributes if model.channel == "depolarizing" else {"channel": model.channel}
    given = {name: torch.as_tensor(value, dtype=torch.float64).tolist() for name, value in model.inputs.items()}
    return ", ".join(f"{name} {value}" for name, value in {**names, **given}.items())
