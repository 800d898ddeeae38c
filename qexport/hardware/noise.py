"""Noise models as circuits take them: parameters of each qubit, and what may stand where."""

from qexport.errors import UsageError
from qexport.noise.channels import per_qubit, replaced_share
from qexport.noise.measured import MeasuredNoise
from qexport.noise.model import NoiseModel

# What simulators of other packages hold: 16 * 4^qubits bytes for a density matrix, 16^(qubits + 1) for a channel on all.
MOST_NOISY_QUBITS, MOST_GLOBAL_QUBITS = 12, 4


def check_noise(noise: tuple[NoiseModel, ...], qubits: int) -> None:
    """Raise where noise cannot be put on a register.

    Raises:
        UsageError: a parameter outside its limits, readout before other noise, or too many qubits.
    """
    MeasuredNoise(noise, 1 << qubits)
    for model in noise:
        most, what = (MOST_GLOBAL_QUBITS, "scope global") if model.scope == "global" else (MOST_NOISY_QUBITS, "noise")
        if qubits > most:
            raise UsageError(
                f"{what} is simulated on up to {most} qubits here, got {qubits}; take QuantumNoise, which has none"
            )


def qubit_parameters(model: NoiseModel, qubits: int) -> list[tuple[float, ...]]:
    """(level,) of each qubit; (replaced share,) for depolarizing, whatever its convention, and (time, T1, T2, excited
    population) for thermal_relaxation."""
    values = dict(model.inputs)
    if model.channel == "depolarizing":
        values["level"] = replaced_share(model.convention, model.level, qubits, 1)
    elif model.channel == "thermal_relaxation":
        values.setdefault("excited_population", 0.0)
    return list(zip(*(per_qubit(name, value, qubits).tolist() for name, value in values.items()), strict=True))
