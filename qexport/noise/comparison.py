"""Mitigation methods side by side, at the same total number of shots: theory and measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qexport.arguments import check_tensors, several, whole
from qexport.errors import UsageError
from qexport.noise.measured import MeasuredNoise
from qexport.noise.mitigation import Mitigation, mitigated, parse_mitigation
from qexport.noise.model import NoiseModel
from qexport.ops.kernels import kernels
from qexport.ops.probability_rows import check_rows

METHODS = ("none", "readout_inversion", "readout_inversion:project", "zne", "pec", "repetition:3")


@dataclass(frozen=True)
class MitigationError:
    """What a method is off by, as sums over outcomes of squares, means over rows.

    Attributes:
        method: its text.
        qubits: that a row needs.
        overhead: factor in shots, `Mitigation.overhead`.
        bias2, variance: theory: |E estimate - truth|^2 and E |estimate - E estimate|^2; NaN for the projection on
            probabilities, which is not linear.
        measured_bias2, measured_variance: of the runs; the first is an unbiased estimate, and may be negative.
        measured_mse, standard_error: mean of |estimate - truth|^2 over the runs, and its standard error.
    """

    method: str
    qubits: int
    overhead: float
    bias2: float
    variance: float
    measured_bias2: float
    measured_variance: float
    measured_mse: float
    standard_error: float

    @property
    def mse(self) -> float:
        """bias2 + variance, of theory."""
        return self.bias2 + self.variance


def compare_mitigation(
    p: torch.Tensor,
    noise: NoiseModel | Sequence[NoiseModel],
    shots: int,
    *,
    basis: str = "z",
    methods: Sequence[str | Mitigation] = METHODS,
    runs: int = 1000,
    seed: int = 0,
) -> list[MitigationError]:
    """The error of every method that gets the same number of shots in all.

    Args:
        p: (rows, n) or (n,), rows of probabilities.
        noise: a model, or several in the order they act.
        shots: measurements of each row, whatever the method does with them.
        basis: z or x.
        methods: texts of `parse_mitigation`, or methods. Those that do not apply to the noise, or
            need more shots, are left out.
        runs: independent estimates of each row.
        seed: of the draws.

    Returns:
        One item per method that applies.

    Raises:
        UsageError: rows that are no probabilities, shots or runs below their limits, or a parameter outside its own.
    """
    check_tensors({"p": p})
    check_rows("compare_mitigation", p, least=2)
    whole("shots", shots), whole("runs", runs, 2)
    p = p.detach().double().reshape(-1, p.shape[-1])
    p = p / p.sum(-1, keepdim=True)
    kernel = kernels() is not None and p.device.type == "cpu"
    device = MeasuredNoise(noise, p.shape[-1], basis, kernel=kernel)
    found = []
    for method in several("methods", methods):
        method = method if isinstance(method, Mitigation) else parse_mitigation(method)
        try:
            method.experiments(device, shots)
        except UsageError:
            continue
        found.append(_error(method, device, p, shots, runs, seed))
    return found


def _error(method: Mitigation, noise: MeasuredNoise, p, shots, runs, seed) -> MitigationError:
    truth = noise.noiseless(p)
    bias2, variance = theory(method, noise, p, shots)
    many = p[:, None].expand(len(p), runs, p.shape[-1])  # a run is a query: its draws are its own
    estimates = mitigated(method, noise, many, shots, seed)
    spread = estimates.var(1, correction=1).sum(-1)
    off = (estimates.mean(1) - truth).square().sum(-1) - spread / runs
    squares = (estimates - truth[:, None]).square().sum(-1)
    standard_error = (squares.var(1, correction=1) / runs).sum().sqrt() / len(p)
    return MitigationError(
        str(method),
        method.qubits(noise),
        method.overhead(noise),
        bias2,
        variance,
        *(float(x.mean()) for x in (off, spread, squares)),
        float(standard_error),
    )


def theory(method: Mitigation, noise: MeasuredNoise, p: torch.Tensor, shots: int) -> tuple[float, float]:
    """(|bias|^2, variance) of a method, means over rows (rows, n).

    An experiment whose shot counts the vector r_m at outcome m of probability w_m has the variance
    (sum_m w_m |r_m|^2 - |sum_m w_m r_m|^2) / shots; experiments are independent. NaN where the estimate is not linear.
    """
    if not method.linear:
        return float("nan"), float("nan")
    mean, variance = 0, 0
    for experiment in method.experiments(noise, shots):
        w = experiment.rows(p)
        counts = experiment.read(torch.eye(w.shape[-1], dtype=w.dtype, device=w.device))
        part = w @ counts
        mean = mean + part
        variance = variance + (w @ counts.square().sum(-1) - part.square().sum(-1)) / experiment.shots
    return float((mean - noise.noiseless(p)).square().sum(-1).mean()), float(variance.mean())
