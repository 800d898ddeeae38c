"""The torch reference of QuantumNoise: the channels of docs/noise.md, once by their Kraus operators on a density matrix and
once in closed form, on the measured probabilities alone.

Qubit k is bit k of the index of a state (little-endian, as in Qiskit). Everything is computed in float64 or complex128.
"""

import torch

from qexport.errors import UsageError
from qexport.ops.probability_rows import check_rows
from qexport.ops.quantum_noise import SPEC

HADAMARD = torch.tensor([[1, 1], [1, -1]], dtype=torch.complex128) / 2**0.5
PAULIS = torch.tensor([[[1, 0], [0, 1]], [[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]], dtype=torch.complex128)
TOLERANCE = 1e-10  # of what must be exact in float64: completeness of Kraus operators, the residual of a closed form


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
    if a["basis"] == "x":
        p = walsh_hadamard(p.sqrt()).square()
    if a["scope"] == "global":
        shares = replaced_share(a["convention"], level, qubits, qubits)
        if (shares != shares[0]).any():
            raise UsageError("[QuantumNoise] level must be one number with scope global, got one per qubit that differ")
        strength = shares[0].to(dtype)
        p = (1 - strength) * p + strength * p.sum(-1, keepdim=True) / p.shape[-1]
    else:
        matrices = transition_matrices(a["channel"], qubits, *parameters, convention=a["convention"], basis=a["basis"])
        p = apply_transitions(p, matrices.to(dtype))
    noisy, leak = p[..., :n], p[..., n:].sum(-1)
    if a["renormalize"]:
        kept = noisy.sum(-1, keepdim=True)
        noisy = torch.where(kept > 0, noisy / kept, 0)
    return noisy.to(probabilities.dtype), leak


def num_qubits(n: int) -> int:
    """ceil(log2 n): the qubits of a register with n states in use."""
    return (n - 1).bit_length()


# Parameters of channels


def per_qubit(name: str, value, qubits: int) -> torch.Tensor:
    """A parameter as float64 (qubits,), from a number or a tensor () or (1,) or (qubits,).

    Raises:
        UsageError: None, or another shape.
    """
    if value is None:
        raise UsageError(f"[QuantumNoise] {name} is missing; thermal_relaxation needs it")
    value = torch.as_tensor(value, dtype=torch.float64)
    if value.shape not in ((), (1,), (qubits,)):
        raise UsageError(
            f"[QuantumNoise] {name} has shape {tuple(value.shape)}, expected one number or ({qubits},), one per qubit"
        )
    return value.expand(qubits)


def _within(name: str, values: torch.Tensor, most: float, why: str = "") -> torch.Tensor:
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
        return _within("level", level, 1) * most
    return _within("level", level, most, f" with convention replace on {width} qubit{'s' if width > 1 else ''}")


def _thermal(qubits, time, T1, T2, excited_population):
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
    return -torch.expm1(-time / T1), torch.exp(-time / T2), _within("excited_population", excited, 1)


def _readout(qubits, level):
    """P(1 read | 0) and P(0 read | 1) of each qubit: float64 (qubits, 2)."""
    level = torch.as_tensor(level, dtype=torch.float64)
    if level.ndim < 2:
        level = per_qubit("level", level, qubits)[:, None]
    elif level.shape not in ((1, 2), (qubits, 2)):
        raise UsageError(
            f"[QuantumNoise] level has shape {tuple(level.shape)}, expected one number, ({qubits},), (1, 2) or ({qubits}, 2)"
        )
    return _within("level", level, 1).expand(qubits, 2)


def _matrices(entries) -> torch.Tensor:
    """(qubits, 2, 2) from a nested list of four (qubits,) tensors."""
    return torch.stack([torch.stack(row, -1) for row in entries], -2)


# Closed form


def transition_matrices(
    channel, qubits, level, T1=None, T2=None, excited_population=None, *, convention="replace", basis="z"
) -> torch.Tensor:
    """S[k, i, j]: probability that qubit k is measured as i after the channel where it would have been j without.

    In basis x that is a flip with probability (1 - c) / 2, c the factor of `coherence`; readout is in every basis its own.

    Returns:
        float64 (qubits, 2, 2), columns summing to one.

    Raises:
        UsageError: a parameter outside its limits.
    """
    if channel == "readout":
        up, down = _readout(qubits, level).unbind(-1)
    elif basis == "x":
        up = down = (1 - coherence(channel, qubits, level, T1, T2, excited_population, convention=convention)) / 2
    elif channel == "thermal_relaxation":
        r, _, excited = _thermal(qubits, level, T1, T2, excited_population)
        up, down = excited * r, (1 - excited) * r
    elif channel == "depolarizing":
        up = down = replaced_share(convention, level, qubits, 1) / 2
    else:
        level = _within("level", per_qubit("level", level, qubits), 1)
        up = level if channel == "bit_flip" else torch.zeros_like(level)
        down = level if channel in ("bit_flip", "amplitude_damping") else torch.zeros_like(level)
    return _matrices([[1 - up, down], [up, 1 - down]])


def coherence(channel, qubits, level, T1=None, T2=None, excited_population=None, *, convention="replace") -> torch.Tensor:
    """c: the factor of the expectation of X of each qubit, and of |0><1| where the channel keeps its phase.

    Returns:
        float64 (qubits,).

    Raises:
        UsageError: a parameter outside its limits, or channel readout, which acts on outcomes.
    """
    if channel == "readout":
        raise UsageError("[QuantumNoise] readout acts on outcomes and has no coherence; take its transition matrices")
    if channel == "thermal_relaxation":
        return _thermal(qubits, level, T1, T2, excited_population)[1]
    if channel == "depolarizing":
        return 1 - replaced_share(convention, level, qubits, 1)
    level = _within("level", per_qubit("level", level, qubits), 1)
    if channel == "bit_flip":
        return torch.ones_like(level)
    return 1 - 2 * level if channel == "phase_flip" else (1 - level).sqrt()


def apply_transitions(p: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """(S_{q-1} x ... x S_0) p for p (..., 2^q) and matrices (q, 2, 2): a butterfly per qubit, O(n log n)."""
    for k, matrix in enumerate(matrices):
        pairs = p.unflatten(-1, (-1, 2, 1 << k))  # axis -2 is bit k
        p = torch.einsum("ij,...jl->...il", matrix, pairs).flatten(-3)
    return p


def walsh_hadamard(amplitudes: torch.Tensor) -> torch.Tensor:
    """A Hadamard gate on every qubit of (..., 2^q) amplitudes."""
    qubits = num_qubits(amplitudes.shape[-1])
    return apply_transitions(amplitudes, HADAMARD.real.to(amplitudes.dtype).expand(qubits, 2, 2))


# Density matrices: any Kraus operators, any unitary


def kraus_operators(
    channel, qubits, level, T1=None, T2=None, excited_population=None, *, convention="replace"
) -> torch.Tensor:
    """The Kraus operators of a channel on each qubit: complex128 (qubits, operators, 2, 2). readout: its measurement,
    which belongs behind the change of basis.

    Raises:
        UsageError: a parameter outside its limits.
    """
    if channel == "readout":
        roots = transition_matrices(channel, qubits, level).sqrt()
        places = torch.eye(4, dtype=torch.float64).reshape(4, 2, 2)
        return (places * roots[:, None]).to(torch.complex128)
    if channel == "thermal_relaxation":
        r, c, excited = _thermal(qubits, level, T1, T2, excited_population)
        # Generalised amplitude damping leaves the coherence sqrt(1 - r) = exp(-t / 2 T1); phase damping takes the rest.
        rest = torch.where(c > 0, c.square() / (1 - r).clamp(min=torch.finfo(r.dtype).tiny), 0).clamp(max=1)
        up, down = (weight.sqrt()[:, None, None, None] for weight in (excited, 1 - excited))
        damping = _damping(r)
        damping = torch.cat([down * damping, up * damping.flip(-1, -2)], 1)
        return torch.einsum("qaij,qbjk->qabik", _dephasing(1 - rest), damping).flatten(1, 2)
    if channel == "depolarizing":
        share = replaced_share(convention, level, qubits, 1)
        weights = torch.stack([1 - 0.75 * share, *[share / 4] * 3], -1).clamp(min=0)
        return weights.sqrt()[..., None, None] * PAULIS
    level = _within("level", per_qubit("level", level, qubits), 1)
    if channel == "amplitude_damping":
        return _damping(level)
    if channel == "phase_damping":
        return _dephasing(level)
    weights = torch.stack([1 - level, level], -1)
    return weights.sqrt()[..., None, None] * PAULIS[[0, 1 if channel == "bit_flip" else 3]]


def _damping(g):
    zero, one = torch.zeros_like(g), torch.ones_like(g)
    kept, lost = _matrices([[one, zero], [zero, (1 - g).sqrt()]]), _matrices([[zero, g.sqrt()], [zero, zero]])
    return torch.stack([kept, lost], 1).to(torch.complex128)


def _dephasing(b):
    zero, one = torch.zeros_like(b), torch.ones_like(b)
    kept, lost = _matrices([[one, zero], [zero, (1 - b).sqrt()]]), _matrices([[zero, zero], [zero, b.sqrt()]])
    return torch.stack([kept, lost], 1).to(torch.complex128)


def check_kraus(kraus: torch.Tensor) -> None:
    """Raise where sum_k K_k^dagger K_k is not the identity, for kraus (..., operators, 2, 2).

    Raises:
        UsageError: names the deviation.
    """
    total = torch.einsum("...kji,...kjl->...il", kraus.conj(), kraus)
    off = float((total - torch.eye(2)).abs().max())
    if not off <= TOLERANCE:
        raise UsageError(
            f"[QuantumNoise] Kraus operators must sum to the identity within {TOLERANCE:g}, they are off by {off:g}"
        )


def transitions_of(kraus: torch.Tensor) -> torch.Tensor:
    """S_ij = sum_k |K_k[i, j]|^2 of kraus (..., operators, 2, 2): float64 (..., 2, 2)."""
    return kraus.abs().square().sum(-3)


def residual_of(kraus: torch.Tensor) -> float:
    """max |sum_k K_k[i, 0] conj K_k[i, 1]|: what coherences add to measured probabilities. Where it is 0, and only there,
    the channel acts on the diagonal of a density matrix by itself, as `transitions_of` says."""
    return float(torch.einsum("...ki,...ki->...i", kraus[..., 0], kraus[..., 1].conj()).abs().max())


def density_matrix(p: torch.Tensor) -> torch.Tensor:
    """|psi><psi| of psi = sum_j sqrt(p_j) |j>: complex128 (..., d, d) from p (..., d)."""
    amplitudes = p.to(torch.complex128).sqrt()
    return amplitudes[..., :, None] * amplitudes[..., None, :].conj()


def apply_kraus(rho: torch.Tensor, kraus: torch.Tensor) -> torch.Tensor:
    """sum_k K_k rho K_k^dagger on every qubit: rho (..., 2^q, 2^q), kraus (q, operators, 2, 2)."""
    for k, operators in enumerate(kraus):
        split = -1, 2, 1 << k
        rho = rho.unflatten(-1, split).unflatten(-4, split)  # axes -5 and -2 are bit k of row and column
        rho = torch.einsum("aij,...jbdkf,alk->...ibdlf", operators, rho, operators.conj()).flatten(-3).flatten(-4, -2)
    return rho


def channel_probabilities(p: torch.Tensor, kraus: torch.Tensor, unitary: torch.Tensor | None = None) -> torch.Tensor:
    """Probabilities of measuring sum_j sqrt(p_j) |j> after a channel, and a unitary behind it.

    Takes the closed form where there is one: without a unitary, or with one of a single qubit, when `residual_of` says that
    coherences do not count; else a density matrix.

    Args:
        p: (..., 2^q), rows that sum to one.
        kraus: complex (q, operators, 2, 2), of each qubit.
        unitary: complex (2, 2), a gate on every qubit; or (2^q, 2^q); None for none.

    Returns:
        float64 (..., 2^q).

    Raises:
        UsageError: Kraus operators that do not sum to the identity.
    """
    check_kraus(kraus)
    if unitary is None or unitary.shape == (2, 2):
        gate = torch.eye(2, dtype=torch.complex128) if unitary is None else unitary.to(torch.complex128)
        turned = gate @ kraus @ gate.conj().mT
        if residual_of(turned) <= TOLERANCE:
            state = apply_transitions(p.to(torch.complex128).sqrt(), gate.expand(len(kraus), 2, 2))
            return apply_transitions(state.abs().square(), transitions_of(turned))
        unitary = torch.ones(1, 1, dtype=torch.complex128)
        for _ in kraus:
            unitary = torch.kron(gate, unitary)
    rho = unitary @ apply_kraus(density_matrix(p), kraus) @ unitary.conj().mT
    return rho.diagonal(dim1=-2, dim2=-1).real


def noisy_overlap(w: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """|<a|b>|^2 as a SWAP test measures it when dephasing noise has met a: w^T [[1, c], [c, 1]]^(x q) w.

    Args:
        w: (..., 2^q), products a_j b_j of real amplitudes.
        c: (q,), the factor of each qubit's coherences, of `coherence` for phase_damping or phase_flip.

    Returns:
        (...), (sum w)^2 where c is 1, sum w^2 where it is 0.
    """
    one = torch.ones_like(c)
    return (w * apply_transitions(w, _matrices([[one, c], [c, one]]).to(w.dtype))).sum(-1)
