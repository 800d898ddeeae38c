"""The torch reference of QuantumOverlap: density matrices in float64."""

import torch

from qexport.errors import UsageError
from qexport.noise.channels import global_share, num_qubits
from qexport.noise.density import PAULIS, exactness, kraus_operators, overlap_probabilities
from qexport.ops.probability_rows import MAX_AXES, SUM_TOLERANCE
from qexport.ops.quantum_noise_ref import as_complex, check_inputs
from qexport.ops.quantum_overlap import SPEC


def quantum_overlap_ref(
    queries, keys, level, T1=None, T2=None, excited_population=None, kraus=None, **attributes
) -> torch.Tensor:
    """The probability of finding each key's state in each query's state after a noise channel.

    Args:
        queries: (..., m, d) tensor, keys: (..., k, d) of the same type; rows are divided by their norm.
        level: number or tensor, () or (qubits,).
        T1, T2, excited_population: numbers or tensors, () or (qubits,), for thermal_relaxation.
        kraus: (operators, 2, 2, 2) or (qubits, operators, 2, 2, 2), real and imaginary parts last, for channel kraus.
        attributes: those of the op table, with its defaults.

    Returns:
        (..., m, k) of the type of `queries`.

    Raises:
        UsageError: an attribute, an input or a shape outside its limits.
    """
    a = SPEC.resolve(attributes)
    _check_shapes(queries, keys)
    check_inputs(a["channel"], T1=T1, T2=T2, excited_population=excited_population, kraus=kraus)
    qubits = num_qubits(queries.shape[-1])
    states = [_states(rows, 1 << qubits) for rows in (queries, keys)]
    if a["scope"] == "global":
        strength = global_share(a["convention"], level, qubits)
        present = [x.square().sum(-1) for x in states]
        overlaps = (1 - strength) * overlap_probabilities(*states, PAULIS[:1].expand(qubits, 1, 2, 2))
        overlaps = overlaps + strength / 2**qubits * present[0][..., :, None] * present[1][..., None, :]
    else:
        kraus = as_complex(kraus)
        parameters = level, T1, T2, excited_population, kraus
        operators = kraus_operators(a["channel"], qubits, *parameters, convention=a["convention"])
        tolerance = exactness(torch.complex128 if kraus is None else kraus.dtype)
        overlaps = overlap_probabilities(*states, operators, tolerance)
    return overlaps.clamp(0, 1).to(queries.dtype)


def _states(rows, d):
    """Rows (..., size) as float64 amplitudes (..., d) of norm one; rows of zeros stay so."""
    rows = torch.nn.functional.pad(rows.double(), (0, d - rows.shape[-1]))
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / norm.masked_fill(norm == 0, 1)  # a division by 0, even one that is not taken, has no gradient


def _check_shapes(queries, keys):
    dtype = str(queries.dtype).removeprefix("torch.")
    if dtype not in SUM_TOLERANCE:
        raise UsageError(f"[QuantumOverlap] queries must be float32, float16, bfloat16 or float64, got {dtype}")
    if keys.dtype != queries.dtype:
        raise UsageError("[QuantumOverlap] keys must be of the type of queries")
    if not 2 <= queries.ndim <= MAX_AXES:
        raise UsageError(f"[QuantumOverlap] queries must have 2 to {MAX_AXES} dimensions, got {queries.ndim}")
    if queries.shape[-1] < 2:
        raise UsageError(f"[QuantumOverlap] queries must have rows of >= 2 numbers, got {queries.shape[-1]}")
    q, k = tuple(queries.shape), tuple(keys.shape)
    if len(k) != len(q) or (*k[:-2], k[-1]) != (*q[:-2], q[-1]):
        raise UsageError(
            f"[QuantumOverlap] keys have shape {k}, expected that of the queries, {q}, but for the last dimension but one"
        )
