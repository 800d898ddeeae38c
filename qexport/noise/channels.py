"""The channels of docs/noise.md in closed form: what they do to measured probabilities.

Qubit k is bit k of the index of a state (little-endian, as in Qiskit). Parameters, and matrices from them, are float64 on
the CPU, whatever holds the rows.
"""

import torch

from qexport.errors import UsageError

HADAMARD = torch.tensor([[1, 1], [1, -1]], dtype=torch.complex128) / 2**0.5
LEAST_KEPT = 1e-6  # of a state's strength, where noise is inverted: dividing by less leaves rounding errors alone


def num_qubits(n: int) -> int:
    """ceil(log2 n): the qubits of a register with n states in use."""
    return (n - 1).bit_length()


def per_qubit(name: str, value, qubits: int) -> torch.Tensor:
    """A parameter as float64 (qubits,), from a number or a tensor () or (1,) or (qubits,).

    Raises:
        UsageError: None, or another shape.
    """
    if value is None:
        raise UsageError(f"[QuantumNoise] {name} is missing; thermal_relaxation needs it")
    value = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    if value.shape not in ((), (1,), (qubits,)):
        raise UsageError(
            f"[QuantumNoise] {name} has shape {tuple(value.shape)}, expected one number or ({qubits},), one per qubit"
        )
    return value.expand(qubits)


def within(name: str, values: torch.Tensor, most: float, why: str = "") -> torch.Tensor:
    """`values`, checked to lie in 0 to `most`.

    Raises:
        UsageError: one does not; `why` follows the limit in the message.
    """
    for value in values.flatten().tolist():
        if not 0 <= value <= most:
            raise UsageError(f"[QuantumNoise] {name} must be in 0 to {most:g}{why}, got {value:g}")
    return values


def replaced_share(convention: str, level, qubits: int, width: int) -> torch.Tensor:
    """The share l of (1 - l) rho + l I / 2^width that a depolarizing level means: float64 (qubits,).

    width: qubits that one channel acts on: 1 with scope local, all of them with global. With 4^width - 1 Pauli errors other
    than the identity, an error probability p is l = p 4^width / (4^width - 1), which is also the largest l.

    Raises:
        UsageError: a level outside its limits.
    """
    most = 4.0**width / (4.0**width - 1)
    level = per_qubit("level", level, qubits)
    if convention == "error":
        return within("level", level, 1) * most
    return within("level", level, most, f" with convention replace on {width} qubit{'s' if width > 1 else ''}")


def thermal_factors(qubits, time, T1, T2, excited_population):
    """(r, decoherence, excited population) of each qubit: r = 1 - exp(-t / T1), coherence exp(-t / T2)."""
    time = per_qubit("level", time, qubits)
    T1, T2 = per_qubit("T1", T1, qubits), per_qubit("T2", T2, qubits)
    for name, values in (("T1", T1), ("T2", T2)):
        for value in values.tolist():
            if not value > 0:
                raise UsageError(f"[QuantumNoise] {name} must be > 0, got {value:g}")
    for t1, t2 in zip(T1.tolist(), T2.tolist(), strict=True):
        if t2 > 2 * t1:
            raise UsageError(f"[QuantumNoise] T2 must be at most 2 T1 = {2 * t1:g}, got {t2:g}")
    for value in time.tolist():
        if not 0 <= value < float("inf"):
            raise UsageError(f"[QuantumNoise] level must be a time >= 0 with thermal_relaxation, got {value:g}")
    excited = per_qubit("excited_population", 0.0 if excited_population is None else excited_population, qubits)
    return -torch.expm1(-time / T1), torch.exp(-time / T2), within("excited_population", excited, 1)


def global_share(convention: str, level, qubits: int) -> torch.Tensor:
    """`replaced_share` of a channel on all qubits as one system: float64 ().

    Raises:
        UsageError: as `replaced_share`, or levels that differ between qubits.
    """
    shares = replaced_share(convention, level, qubits, qubits)
    if (shares != shares[0]).any():
        raise UsageError("[QuantumNoise] level must be one number with scope global, got one per qubit that differ")
    return shares[0]


def _readout(qubits, level):
    """P(1 read | 0) and P(0 read | 1) of each qubit: float64 (qubits, 2)."""
    level = torch.as_tensor(level, dtype=torch.float64, device="cpu")
    if level.ndim < 2:
        level = per_qubit("level", level, qubits)[:, None]
    elif level.shape not in ((1, 2), (qubits, 2)):
        raise UsageError(
            f"[QuantumNoise] level has shape {tuple(level.shape)}, expected one number, ({qubits},), (1, 2) or ({qubits}, 2)"
        )
    return within("level", level, 1).expand(qubits, 2)


def matrices_of(entries) -> torch.Tensor:
    """(qubits, 2, 2) from a nested list of four (qubits,) tensors."""
    return torch.stack([torch.stack(row, -1) for row in entries], -2)


def check_named(channel: str) -> None:
    """Raise for channel kraus, whose operators alone say what it does."""
    if channel == "kraus":
        raise UsageError("[QuantumNoise] channel kraus has no closed form by its name; take its operators")


def transition_matrices(
    channel, qubits, level, T1=None, T2=None, excited_population=None, *, convention="replace", basis="z"
) -> torch.Tensor:
    """S[k, i, j]: probability that qubit k is measured as i after the channel where it would have been j without.

    In basis x that is a flip with probability (1 - c) / 2, c the factor of `coherence`; readout is in every basis its own.

    Returns:
        float64 (qubits, 2, 2), columns summing to one.

    Raises:
        UsageError: a parameter outside its limits, or channel kraus.
    """
    check_named(channel)
    if channel == "readout":
        up, down = _readout(qubits, level).unbind(-1)
    elif basis == "x":
        up = down = (1 - coherence(channel, qubits, level, T1, T2, excited_population, convention=convention)) / 2
    elif channel == "thermal_relaxation":
        r, _, excited = thermal_factors(qubits, level, T1, T2, excited_population)
        up, down = excited * r, (1 - excited) * r
    elif channel == "depolarizing":
        up = down = replaced_share(convention, level, qubits, 1) / 2
    else:
        level = within("level", per_qubit("level", level, qubits), 1)
        up = level if channel == "bit_flip" else torch.zeros_like(level)
        down = level if channel in ("bit_flip", "amplitude_damping") else torch.zeros_like(level)
    return matrices_of([[1 - up, down], [up, 1 - down]])


def kept_strength(strength: torch.Tensor, what: str) -> torch.Tensor:
    """`strength`, what noise leaves of the difference of two states' outcomes: the divisor of its inverse.

    Raises:
        UsageError: less than LEAST_KEPT of it, so that there is nothing to invert; the message names `what`.
    """
    if not strength.abs() >= LEAST_KEPT:
        raise UsageError(
            f"[QuantumNoise] inverse does not exist: {what} keeps {float(strength):g} of its state, the least is "
            f"{LEAST_KEPT:g}; take another level"
        )
    return strength


def inverse_matrices(matrices: torch.Tensor) -> torch.Tensor:
    """The inverse of each of the transition matrices (qubits, 2, 2); columns sum to one, elements may be below 0.

    Raises:
        UsageError: a matrix whose outcomes hardly depend on the state, such as a flip of 1/2.
    """
    for k, matrix in enumerate(matrices):
        kept_strength(1 - matrix[1, 0] - matrix[0, 1], f"qubit {k}")
    return torch.linalg.inv(matrices)


def coherence(channel, qubits, level, T1=None, T2=None, excited_population=None, *, convention="replace") -> torch.Tensor:
    """c: the factor of the expectation of X of each qubit, and of |0><1| where the channel keeps its phase.

    Returns:
        float64 (qubits,).

    Raises:
        UsageError: a parameter outside its limits, channel kraus, or channel readout, which acts on outcomes.
    """
    check_named(channel)
    if channel == "readout":
        raise UsageError("[QuantumNoise] readout acts on outcomes and has no coherence; take its transition matrices")
    if channel == "thermal_relaxation":
        return thermal_factors(qubits, level, T1, T2, excited_population)[1]
    if channel == "depolarizing":
        return 1 - replaced_share(convention, level, qubits, 1)
    level = within("level", per_qubit("level", level, qubits), 1)
    if channel == "bit_flip":
        return torch.ones_like(level)
    return 1 - 2 * level if channel == "phase_flip" else (1 - level).sqrt()


def apply_transitions(p: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """(S_{q-1} x ... x S_0) p for p (..., 2^q) and matrices (q, 2, 2): a butterfly per qubit, O(n log n)."""
    for k, matrix in enumerate(matrices):
        pairs = p.unflatten(-1, (-1, 2, 1 << k))  # axis -2 is bit k
        p = torch.einsum("ij,...jl->...il", matrix, pairs).flatten(-3)
    return p


def amplitudes_of(p: torch.Tensor) -> torch.Tensor:
    """sqrt p, with the gradient 0 where p is 0: the limit for whoever reaches p through a softmax, which is flat there,
    instead of an infinity that becomes NaN."""
    return torch.where(p > 0, torch.where(p > 0, p, 1).sqrt(), 0)


def walsh_hadamard(amplitudes: torch.Tensor) -> torch.Tensor:
    """A Hadamard gate on every qubit of (..., 2^q) amplitudes."""
    qubits = num_qubits(amplitudes.shape[-1])
    return apply_transitions(amplitudes, HADAMARD.real.to(amplitudes).expand(qubits, 2, 2))
