"""Channels by their Kraus operators, on density matrices: any operators, any unitary. Everything is complex128."""

import torch

from qexport.errors import UsageError
from qexport.noise.channels import (
    apply_transitions,
    matrices_of,
    per_qubit,
    replaced_share,
    thermal_factors,
    transition_matrices,
    within,
)

PAULIS = torch.tensor([[[1, 0], [0, 1]], [[0, 1], [1, 0]], [[0, -1j], [1j, 0]], [[1, 0], [0, -1]]], dtype=torch.complex128)
TOLERANCE = 1e-10  # of what must be exact in float64: completeness of Kraus operators, the residual of a closed form


def exactness(dtype: torch.dtype) -> float:
    """How far Kraus operators and unitaries of a complex type may be from what they must be."""
    return TOLERANCE if dtype == torch.complex128 else 1e-6


def kraus_operators(
    channel, qubits, level, T1=None, T2=None, excited_population=None, kraus=None, *, convention="replace"
) -> torch.Tensor:
    """The Kraus operators of a channel on each qubit: complex128 (qubits, operators, 2, 2). readout: its measurement,
    which belongs behind the change of basis.

    Args:
        kraus: complex (operators, 2, 2) or (qubits, operators, 2, 2), for channel kraus; they act with probability `level`.
        channel, qubits, level, T1, T2, excited_population, convention: as everywhere.

    Raises:
        UsageError: a parameter outside its limits, or Kraus operators that do not sum to the identity.
    """
    if channel == "kraus":
        return _given_operators(qubits, level, kraus)
    if channel == "readout":
        roots = transition_matrices(channel, qubits, level).sqrt()
        places = torch.eye(4, dtype=torch.float64).reshape(4, 2, 2)
        return (places * roots[:, None]).to(torch.complex128)
    if channel == "thermal_relaxation":
        r, c, excited = thermal_factors(qubits, level, T1, T2, excited_population)
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
    level = within("level", per_qubit("level", level, qubits), 1)
    if channel == "amplitude_damping":
        return _damping(level)
    if channel == "phase_damping":
        return _dephasing(level)
    weights = torch.stack([1 - level, level], -1)
    return weights.sqrt()[..., None, None] * PAULIS[[0, 1 if channel == "bit_flip" else 3]]


def _given_operators(qubits, level, kraus):
    if kraus is None:
        raise UsageError("[QuantumNoise] kraus is missing; channel kraus needs it")
    fits = kraus.shape[-2:] == (2, 2) and (kraus.ndim == 3 or (kraus.ndim == 4 and len(kraus) == qubits))
    if not fits or not kraus.shape[-3]:
        raise UsageError(
            f"[QuantumNoise] kraus has shape {(*kraus.shape, 2)}, expected (operators, 2, 2, 2) or ({qubits}, operators, 2, "
            "2, 2), real and imaginary parts last"
        )
    check_kraus(kraus)
    level = within("level", per_qubit("level", level, qubits), 1)[:, None, None, None]
    operators = kraus.to(torch.complex128).expand(qubits, *kraus.shape[-3:])
    return torch.cat([(1 - level).sqrt() * PAULIS[:1].expand(qubits, 1, 2, 2), level.sqrt() * operators], 1)


def _damping(g):
    zero, one = torch.zeros_like(g), torch.ones_like(g)
    kept, lost = matrices_of([[one, zero], [zero, (1 - g).sqrt()]]), matrices_of([[zero, g.sqrt()], [zero, zero]])
    return torch.stack([kept, lost], 1).to(torch.complex128)


def _dephasing(b):
    zero, one = torch.zeros_like(b), torch.ones_like(b)
    kept, lost = matrices_of([[one, zero], [zero, (1 - b).sqrt()]]), matrices_of([[zero, zero], [zero, b.sqrt()]])
    return torch.stack([kept, lost], 1).to(torch.complex128)


def check_kraus(kraus: torch.Tensor, tolerance: float | None = None) -> None:
    """Raise where sum_k K_k^dagger K_k is not the identity, for kraus (..., operators, 2, 2), within a tolerance: that of
    their type where none is given.

    Raises:
        UsageError: names the deviation.
    """
    total = torch.einsum("...kji,...kjl->...il", kraus.conj(), kraus)
    off = float((total - torch.eye(2, device=total.device)).abs().max().detach())
    tolerance = exactness(kraus.dtype) if tolerance is None else tolerance
    if not off <= tolerance:
        raise UsageError(
            f"[QuantumNoise] Kraus operators must sum to the identity within {tolerance:g}, they are off by {off:g}"
        )


def check_unitary(unitary: torch.Tensor) -> None:
    """Raise where U^dagger U is not the identity, for a complex matrix.

    Raises:
        UsageError: names the deviation.
    """
    off = float((unitary.mH @ unitary - torch.eye(len(unitary))).abs().max().detach())
    if not off <= exactness(unitary.dtype):
        raise UsageError(
            f"[QuantumNoise] unitary must be one within {exactness(unitary.dtype):g}, U^dagger U is off the identity by "
            f"{off:g}"
        )


def transitions_of(kraus: torch.Tensor) -> torch.Tensor:
    """S_ij = sum_k |K_k[i, j]|^2 of kraus (..., operators, 2, 2): float64 (..., 2, 2)."""
    return kraus.abs().square().sum(-3)


def residual_of(kraus: torch.Tensor) -> float:
    """max |sum_k K_k[i, 0] conj K_k[i, 1]|: what coherences add to measured probabilities. Where it is 0, and only there,
    the channel acts on the diagonal of a density matrix by itself, as `transitions_of` says."""
    across = torch.einsum("...ki,...ki->...i", kraus[..., 0], kraus[..., 1].conj())
    return float(across.detach().abs().max())


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


def channel_probabilities(
    p: torch.Tensor, kraus: torch.Tensor, unitary: torch.Tensor | None = None, tolerance: float = TOLERANCE
) -> torch.Tensor:
    """Probabilities of measuring sum_j sqrt(p_j) |j> after a channel, and a unitary behind it.

    Takes the closed form where there is one: without a unitary, or with one of a single qubit, when `residual_of` says that
    coherences do not count; else a density matrix.

    Args:
        p: (..., 2^q), rows that sum to one.
        kraus: complex (q, operators, 2, 2), of each qubit.
        unitary: complex (2, 2), a gate on every qubit; or (2^q, 2^q); None for none.
        tolerance: how far the operators may be from summing to the identity, and a residual from 0.

    Returns:
        float64 (..., 2^q).

    Raises:
        UsageError: Kraus operators that do not sum to the identity, or a matrix that is not unitary.
    """
    check_kraus(kraus, tolerance)
    if unitary is not None:
        check_unitary(unitary)
        unitary = unitary.to(torch.complex128)
    if unitary is None or unitary.shape == (2, 2):
        gate = torch.eye(2, dtype=torch.complex128) if unitary is None else unitary
        turned = gate @ kraus @ gate.conj().mT
        if residual_of(turned) <= tolerance:
            state = apply_transitions(p.to(torch.complex128).sqrt(), gate.expand(len(kraus), 2, 2))
            return apply_transitions(state.abs().square(), transitions_of(turned))
        unitary = torch.ones(1, 1, dtype=torch.complex128)
        for _ in kraus:
            unitary = torch.kron(gate, unitary)
    rho = unitary @ apply_kraus(density_matrix(p), kraus) @ unitary.conj().mT
    return rho.diagonal(dim1=-2, dim2=-1).real


def overlap_probabilities(
    a: torch.Tensor, b: torch.Tensor, kraus: torch.Tensor, tolerance: float = TOLERANCE
) -> torch.Tensor:
    """<b| E(|a><a|) |b>: the probability of finding b in a state that was prepared as a and met a channel E.

    Operators that are all diagonal multiply element (i, j) of |a><a| by C = C_{q-1} x ... x C_0, C_k[i, j] = sum_a K_a[i, i]
    conj K_a[j, j]: the result is w^dagger C w of w_j = conj(a_j) b_j, O(d log d) a pair. It goes from |<a|b>|^2 at C = 1
    down to sum |w_j|^2 at C = I. Others take a density matrix per a and O(d^2) a pair. Differentiable in all arguments.

    Args:
        a: (..., m, d) amplitudes, real or complex, of norm one; d = 2^q.
        b: (..., k, d), as a.
        kraus: complex (q, operators, 2, 2), of each qubit.
        tolerance: how far the operators may be from summing to the identity.

    Returns:
        float64 (..., m, k).

    Raises:
        UsageError: Kraus operators that do not sum to the identity, or amplitudes of another length than 2^q.
    """
    check_kraus(kraus, tolerance)
    d = 1 << len(kraus)
    if not a.shape[-1] == b.shape[-1] == d:
        raise UsageError(
            f"[QuantumOverlap] states must have {d} amplitudes for {len(kraus)} qubits, got {a.shape[-1]} and {b.shape[-1]}"
        )
    a, b = a.to(torch.complex128), b.to(torch.complex128)
    diagonals = kraus.diagonal(dim1=-2, dim2=-1)
    if torch.equal(torch.diag_embed(diagonals), kraus):
        factors = torch.einsum("qai,qaj->qij", diagonals, diagonals.conj())
        w = a[..., :, None, :].conj() * b[..., None, :, :]
        return torch.linalg.vecdot(w, apply_transitions(w, factors)).real
    rho = apply_kraus(a[..., :, None] * a[..., None, :].conj(), kraus)
    return torch.einsum("...ki,...mij,...kj->...mk", b.conj(), rho, b).real
