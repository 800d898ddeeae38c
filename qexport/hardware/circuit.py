"""The circuit of a row: which gates prepare sum_j sqrt(p_j) |j>, the same for all rows of a length, and by which angles.

Amplitudes that are real and not negative need no gates but RY and CX. From the highest qubit down, qubit t is turned by the
angle that shares out the probability of each value of the qubits above it: a rotation multiplexed over them, which a Gray
code makes 2^m RY and 2^m CX for m qubits above (Mottonen, Vartiainen, Bergholm, Salomaa 2005, quant-ph/0407010). Only the
angles differ between rows, so one circuit with parameters is built and transpiled for all of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from qexport.noise.channels import num_qubits, walsh_hadamard


class Gate(NamedTuple):
    """RY by rotation number `angle` on `target`, or, with a `control`, CX."""

    target: int
    angle: int | None = None
    control: int | None = None


def preparation(qubits: int) -> Iterator[Gate]:
    """The gates in their order: 2^qubits - 1 RY, whose numbers count up, and 2^qubits - 2 CX."""
    for above in range(qubits):
        target, first = qubits - 1 - above, (1 << above) - 1
        for i in range(1 << above):
            yield Gate(target, angle=first + i)
            if above:
                # The bit in which the codes of i and i + 1 differ; behind the last one the highest, where the code closes.
                yield Gate(target, control=target + 1 + min(_trailing_zeros(i + 1), above - 1))


def rotations(p: torch.Tensor) -> torch.Tensor:
    """The angles of `preparation` for rows of probabilities.

    Args:
        p: (..., n) rows that sum to one; the states n .. 2^qubits - 1 get no probability.

    Returns:
        float64 (..., 2^qubits - 1), in the order of the gates.
    """
    qubits = num_qubits(p.shape[-1])
    p = torch.nn.functional.pad(p.double(), (0, (1 << qubits) - p.shape[-1]))
    angles = [p.new_zeros(*p.shape[:-1], 0)]
    for above in range(qubits):
        zero, one = p.unflatten(-1, (1 << above, 2, -1)).sum(-1).sqrt().unbind(-1)
        wanted = 2 * torch.atan2(one, zero)  # of each value of the qubits above
        code = torch.arange(1 << above)
        code ^= code >> 1
        # RY number i turns by +angle or -angle: the CX before it have flipped the target where <value, code i> is odd.
        angles.append(walsh_hadamard(wanted)[..., code] / 2 ** (above / 2))
    return torch.cat(angles, -1)


def _trailing_zeros(number: int) -> int:
    return (number & -number).bit_length() - 1
