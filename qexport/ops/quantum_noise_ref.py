"""The torch reference of QuantumNoise: the closed forms of `qexport.noise.channels`, in float64."""

import torch

from qexport.errors import UsageError
from qexport.noise.channels import (
    amplitudes_of,
    apply_transitions,
    global_share,
    inverse_matrices,
    kept_strength,
    num_qubits,
    transition_matrices,
    walsh_hadamard,
)
from qexport.ops.probability_rows import check_rows
from qexport.ops.quantum_noise import SPEC


def quantum_noise_ref(probabilities, level, T1=None, T2=None, excited_population=None, *, dtype=torch.float64, **attributes):
    """Probabilities of measuring a register that holds rows of probabilities, after noise, in closed form.

    Args:
        probabilities: (..., n) tensor; rows sum to one, or are zeros.
        level: number or tensor, () or (qubits,); readout also (1, 2) or (qubits, 2).
        T1, T2, excited_population: numbers or tensors, () or (qubits,), for thermal_relaxation.
        dtype: what is computed in; the outputs are rounded to the type of `probabilities`.
        attributes: those of the op table, with its defaults.

    Returns:
        (noisy (..., n), leak (...)).

    Raises:
        UsageError: an attribute, a parameter of the channel or a row outside its limits.
    """
    a = SPEC.resolve(attributes)
    check_rows(SPEC.name, probabilities, least=2)
    n = probabilities.shape[-1]
    qubits = num_qubits(n)
    p = torch.nn.functional.pad(probabilities.to(dtype), (0, (1 << qubits) - n))
    parameters = level, T1, T2, excited_population
    for name, value in (("T1", T1), ("T2", T2), ("excited_population", excited_population)):
        if value is not None and a["channel"] != "thermal_relaxation":
            raise UsageError(f"[QuantumNoise] {name} is for channel thermal_relaxation, got {a['channel']}; leave it out")
    if a["basis"] == "x" and not a["inverse"]:
        p = walsh_hadamard(amplitudes_of(p)).square()
    if a["scope"] == "global":
        strength = global_share(a["convention"], level, qubits).to(dtype)
        spread = p.sum(-1, keepdim=True) / p.shape[-1]
        if a["inverse"]:
            p = (p - strength * spread) / kept_strength(1 - strength, "the register")
        else:
            p = (1 - strength) * p + strength * spread
    else:
        matrices = transition_matrices(a["channel"], qubits, *parameters, convention=a["convention"], basis=a["basis"])
        p = apply_transitions(p, (inverse_matrices(matrices) if a["inverse"] else matrices).to(dtype))
    noisy, leak = p[..., :n], p[..., n:].sum(-1)
    if a["renormalize"]:
        kept = noisy.sum(-1, keepdim=True)
        noisy = torch.where(kept > 0, noisy / kept, 0)
    return noisy.to(probabilities.dtype), leak
