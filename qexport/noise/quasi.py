"""The inverse of a channel as a quasi-probability over operations that a device has (docs/noise.md)."""

from __future__ import annotations

import torch

from qexport.errors import UsageError
from qexport.noise.channels import LEAST_KEPT, coherence, matrices_of
from qexport.noise.measured import MeasuredNoise


def quasi_probabilities(noise: MeasuredNoise) -> torch.Tensor:
    """eta with sum_a eta_a O_a the inverse of the noise, for O = I, X, Y, Z and the reset to |0>: float64 (qubits, 5).

    All channels of docs/noise.md multiply X, Y and Z by factors and add t to Z. The reset undoes t; what is left is diagonal
    in the Paulis, a Walsh transform of the inverse factors. For depolarizing noise l that is eta_I = 1 + 3/4 l / (1 - l) and
    -l / (4 (1 - l)) for X, Y and Z.

    Raises:
        UsageError: readout, noise of scope global, or noise that has no inverse.
    """
    x = y = torch.ones(noise.qubits, dtype=torch.float64)
    z, t = x, torch.zeros_like(x)
    if noise.readouts:
        raise UsageError("pec undoes noise of states, and readout acts on outcomes; take readout_inversion")
    for model in noise.channels:
        if model.scope == "global":
            raise UsageError("pec takes noise of single qubits, got scope global; take readout_inversion")
        step = MeasuredNoise([model], noise.n).steps[0]
        up, down = step[:, 1, 0], step[:, 0, 1]
        c = coherence(model.channel, noise.qubits, **model.inputs, convention=model.convention)
        x, y, z = c * x, (1 - up - down if model.channel == "bit_flip" else c) * y, (1 - up - down) * z
        t = (1 - up - down) * t + down - up
    if (torch.stack([x, y, z]).abs() < LEAST_KEPT).any():
        raise UsageError("pec cannot undo noise that leaves nothing of a qubit's state; take a lower level")
    reset = -t / z
    i, x, y, z = 1 - reset, 1 / x, 1 / y, 1 / z
    return torch.stack([i + x + y + z, i + x - y - z, i - x + y - z, i - x - y + z, 4 * reset], -1) / 4


def gamma(eta: torch.Tensor) -> torch.Tensor:
    """sum_a |eta_a| of each qubit: (1 + l/2) / (1 - l) for depolarizing noise l, (1 + g) / (1 - g) for damping g."""
    return eta.abs().sum(-1)


def noisy_operations(noise: MeasuredNoise, eta: torch.Tensor) -> torch.Tensor:
    """What an operation that is drawn with probabilities |eta| / gamma does, with the noise behind it, to measured
    probabilities: float64 (qubits, 2, 2), stochastic."""
    i, x, y, z, reset = eta.abs().unbind(-1)
    stay, flip = (i + z, x + y) if noise.basis == "z" else (i + x, y + z)
    one = torch.ones_like(stay)
    to_zero = one if noise.basis == "z" else one / 2  # |0> has either outcome of the basis x
    zero, other = reset * to_zero, reset * (1 - to_zero)
    operations = matrices_of([[stay + zero, flip + zero], [flip + other, stay + other]])
    return noise.local("pec") @ operations / gamma(eta)[:, None, None]
