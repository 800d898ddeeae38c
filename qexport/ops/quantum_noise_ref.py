"""The torch reference of QuantumNoise in float64: the closed forms of `qexport.noise.channels` by the channel's name, and
density matrices for Kraus operators and unitaries, which the kernel does without where it can."""

import torch

from qexport.errors import UsageError
from qexport.noise.channels import (
    HADAMARD,
    amplitudes_of,
    apply_transitions,
    global_share,
    inverse_matrices,
    kept_strength,
    num_qubits,
    transition_matrices,
    walsh_hadamard,
)
from qexport.noise.density import (
    PAULIS,
    channel_probabilities,
    check_unitary,
    exactness,
    kraus_operators,
    residual_of,
    transitions_of,
)
from qexport.ops.probability_rows import check_rows
from qexport.ops.quantum_noise import SPEC


def as_complex(matrices):
    """A complex tensor from real and imaginary parts on the last axis; None stays None."""
    if matrices is None:
        return None
    return torch.complex(*torch.as_tensor(matrices).unbind(-1))


def check_inputs(channel: str, **inputs) -> None:
    """Raise where an input that belongs to another channel is given."""
    for name, value in inputs.items():
        owner = "kraus" if name == "kraus" else "thermal_relaxation"
        if value is not None and channel != owner:
            raise UsageError(f"[QuantumNoise] {name} is for channel {owner}, got {channel}; leave it out")


def quantum_noise_ref(
    probabilities,
    level,
    T1=None,
    T2=None,
    excited_population=None,
    kraus=None,
    unitary=None,
    *,
    dtype=torch.float64,
    **attributes,
):
    """Probabilities of measuring a register that holds rows of probabilities, after noise.

    Args:
        probabilities: (..., n) tensor; rows sum to one, or are zeros.
        level: number or tensor, () or (qubits,); readout also (1, 2) or (qubits, 2).
        T1, T2, excited_population: numbers or tensors, () or (qubits,), for thermal_relaxation.
        kraus: (operators, 2, 2, 2) or (qubits, operators, 2, 2, 2), real and imaginary parts last, for channel kraus.
        unitary: (2, 2, 2), a gate on every qubit, or (2^qubits, 2^qubits, 2), between the channel and the measurement.
        dtype: what named channels are computed in; the outputs are rounded to the type of `probabilities`.
        attributes: those of the op table, with its defaults.

    Returns:
        (noisy (..., n), leak (...)).

    Raises:
        UsageError: an attribute, an input or a row outside its limits.
    """
    a = SPEC.resolve(attributes)
    check_rows(SPEC.name, probabilities, least=1)
    check_inputs(a["channel"], T1=T1, T2=T2, excited_population=excited_population, kraus=kraus)
    n = probabilities.shape[-1]
    qubits = num_qubits(n)
    if qubits == 0:
        return probabilities.clone(), torch.zeros(probabilities.shape[:-1], dtype=dtype)
    p = torch.nn.functional.pad(probabilities.to(dtype), (0, (1 << qubits) - n))
    parameters = level, T1, T2, excited_population
    if a["channel"] == "kraus" or unitary is not None:
        p = _by_operators(p, qubits, a, parameters, as_complex(kraus), as_complex(unitary))
    elif a["basis"] == "x" and not a["inverse"]:
        p = walsh_hadamard(amplitudes_of(p)).square()
    if a["scope"] == "global":
        strength = global_share(a["convention"], level, qubits).to(dtype)
        spread = p.sum(-1, keepdim=True) / p.shape[-1]
        if a["inverse"]:
            p = (p - strength * spread) / kept_strength(1 - strength, "the register")
        else:
            p = (1 - strength) * p + strength * spread
    elif a["channel"] != "kraus" and unitary is None:
        matrices = transition_matrices(a["channel"], qubits, *parameters, convention=a["convention"], basis=a["basis"])
        p = apply_transitions(p, (inverse_matrices(matrices) if a["inverse"] else matrices).to(p))
    noisy, leak = p[..., :n], p[..., n:].sum(-1)
    if a["renormalize"]:
        kept = noisy.sum(-1, keepdim=True)
        noisy = noisy / torch.where(kept > 0, kept, 1)
    return noisy.to(probabilities.dtype), leak


def _by_operators(p, qubits, a, parameters, kraus, unitary):
    """Rows (..., 2^qubits) after a channel by its operators and a unitary; noise of scope global is left to the caller."""
    if unitary is not None:
        if a["basis"] == "x":
            raise UsageError("[QuantumNoise] basis must be z with a unitary, got x; multiply the Hadamard gates into it")
        if a["inverse"]:
            raise UsageError(
                "[QuantumNoise] inverse takes noise off outcomes, which have no unitary behind them; leave it out"
            )
        if unitary.shape not in ((2, 2), (p.shape[-1], p.shape[-1])):
            raise UsageError(
                f"[QuantumNoise] unitary has shape {(*unitary.shape, 2)}, expected (2, 2, 2) or ({p.shape[-1]}, "
                f"{p.shape[-1]}, 2), real and imaginary parts last"
            )
    if a["scope"] == "global":
        operators = PAULIS[:1].expand(qubits, 1, 2, 2)
    else:
        operators = kraus_operators(a["channel"], qubits, *parameters, kraus, convention=a["convention"])
    if a["channel"] == "readout":  # behind the gate
        if unitary.shape != (2, 2):
            raise UsageError(
                "[QuantumNoise] unitary of all qubits is behind the channel, and readout behind it; give it a node of its "
                "own"
            )
        check_unitary(unitary)
        return channel_probabilities(p, operators @ unitary.to(operators.dtype), tolerance=exactness(unitary.dtype))
    if a["basis"] == "x":
        if a["inverse"]:
            operators = HADAMARD @ operators @ HADAMARD
        else:
            unitary = HADAMARD
    if not a["inverse"]:
        tolerance = exactness(torch.complex128 if kraus is None else kraus.dtype)
        return channel_probabilities(p, operators, unitary, tolerance)
    across = residual_of(operators)
    if not across <= exactness(kraus.dtype):
        raise UsageError(
            f"[QuantumNoise] inverse needs a channel that acts on outcomes alone, coherences add up to {across:g} to "
            "those of a qubit; take another basis"
        )
    return apply_transitions(p, inverse_matrices(transitions_of(operators)))
