"""Noise models as circuits take them: parameters of each qubit, and what may stand where."""

from qexport.errors import UsageError
from qexport.noise.channels import global_share, per_qubit, replaced_share, transition_matrices
from qexport.noise.model import NoiseModel

# What simulators of other packages hold: 16 * 4^qubits bytes for a density matrix, 16^(qubits + 1) for a channel on all.
MOST_NOISY_QUBITS, MOST_GLOBAL_QUBITS = 12, 4


def check_noise(noise: tuple[NoiseModel, ...], qubits: int) -> None:
    """Raise where noise cannot be put on a register.

    Raises:
        UsageError: a parameter outside its limits, readout before other noise, or too many qubits.
    """
    readout = None
    for model in noise:
        if readout is not None and model.channel != "readout":
            raise UsageError(
                f"readout is of the measurement and stands behind all other noise, got {model.channel} after it"
            )
        readout = model if model.channel == "readout" else None
        if model.scope == "global":
            global_share(model.convention, model.level, qubits)
            most, what = MOST_GLOBAL_QUBITS, "scope global"
        else:
            transition_matrices(model.channel, qubits, **model.inputs, convention=model.convention)
            most, what = MOST_NOISY_QUBITS, "noise"
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
