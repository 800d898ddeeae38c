"""Methods of mitigation and correction (docs/noise.md): what each measures, and how it adds up what it reads, linearly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qexport.arguments import real, several, whole
from qexport.errors import UsageError
from qexport.noise.channels import apply_transitions, inverse_matrices, kept_strength, matrices_of
from qexport.noise.measured import MeasuredNoise
from qexport.noise.quasi import gamma, noisy_operations, quasi_probabilities

LARGEST_SCALE = 100
LARGEST_DISTANCE = 999  # binomial coefficients of more are no float64


@dataclass(frozen=True)
class Experiment:
    """One distribution that is measured, and what its frequencies add to an estimate.

    Attributes:
        shots: measurements of each row; None: infinitely many.
        rows: from rows p (..., n) to the distribution (..., m) that is measured.
        read: from its frequencies (..., m) to (..., 2^q), linear.
        times: how often the noise acts, where that is all there is to it and a device can do it; else None.
    """

    shots: int | None
    rows: Callable[[torch.Tensor], torch.Tensor]
    read: Callable[[torch.Tensor], torch.Tensor]
    times: int | None = None


class Mitigation:
    """No mitigation: all shots on the noisy rows. The others are its subclasses."""

    @property
    def linear(self) -> bool:
        """Whether an estimate is linear in the frequencies."""
        return True

    def experiments(self, noise: MeasuredNoise, shots: int | None) -> list[Experiment]:
        """What is measured for an estimate of what a device without noise would give, from `shots` shots in all.

        Raises:
            UsageError: the method does not apply to this noise, or has too few shots.
        """
        return [Experiment(shots, noise.probabilities, lambda f: f, 1)]

    def overhead(self, noise: MeasuredNoise) -> float:
        """How many times as many shots the method may need for the accuracy that shots without noise have: the square of
        what a shot counts at most (Hoeffding, for observables within -1 to 1)."""
        return 1.0

    def qubits(self, noise: MeasuredNoise) -> int:
        """Qubits that a row needs."""
        return noise.qubits

    def finish(self, estimate: torch.Tensor) -> torch.Tensor:
        """The estimate from the sum of what the experiments add."""
        return estimate

    def __str__(self):
        return "none"


@dataclass(frozen=True)
class ReadoutInversion(Mitigation):
    """The transition matrices of the noise, inverted qubit by qubit (a Kronecker product): exact for infinitely many shots.

    Its results are quasi-probabilities, which may be negative.

    Attributes:
        project: move each row to the nearest probabilities (Euclidean): a smaller error, but a bias.
    """

    project: bool = False

    @property
    def linear(self):
        return not self.project

    def experiments(self, noise, shots):
        inverses = [_inverse(step) for step in reversed(noise.steps)]

        def read(frequencies):
            for step in inverses:
                step = step.to(frequencies.device)
                if step.ndim:
                    frequencies = apply_transitions(frequencies, step)
                else:
                    uniform = frequencies.sum(-1, keepdim=True) / frequencies.shape[-1]
                    frequencies = step * frequencies + (1 - step) * uniform
            return frequencies

        return [Experiment(shots, noise.probabilities, read, 1)]

    def overhead(self, noise):
        d, most = 1 << noise.qubits, 1.0
        for step in noise.steps:
            if step.ndim:
                most *= float(_inverse(step).abs().sum(-2).amax(-1).prod())
            else:
                most *= abs(float((1 + step * (d - 2) / d) * _inverse(step)))
        return most**2

    def finish(self, estimate):
        return project_on_simplex(estimate) if self.project else estimate

    def __str__(self):
        return "readout_inversion:project" if self.project else "readout_inversion"


@dataclass(frozen=True)
class ZeroNoiseExtrapolation(Mitigation):
    """Richardson's: the noise acts `scales` times as strongly, and the polynomial through the results is taken at 0.

    The coefficients are c_i = prod_{j != i} x_j / (x_j - x_i): 3, -3, 1 for scales 1, 2, 3. Shots go to the scales in
    proportion to |c_i|, which makes the variance (sum |c|)^2 times that of one experiment with all shots (49), the least
    there is; sum c^2 (19) is the factor where every scale has as many shots as that one experiment. A polynomial is not what
    noise is: a bias of the order of (level)^scales stays.

    Attributes:
        scales: two or more different numbers above 0 and up to 100: the channel is repeated so many times, or, where it is
            no whole number, its matrix is raised to that power.
    """

    scales: tuple[float, ...] = (1, 2, 3)

    def __post_init__(self):
        within = all(0 < real("zne scales", x) <= LARGEST_SCALE for x in several("zne scales", self.scales))
        if len(self.scales) < 2 or len(set(self.scales)) < len(self.scales) or not within:
            raise UsageError(
                f"zne scales must be two or more different numbers above 0 and up to {LARGEST_SCALE}, "
                f"got {_listed(self.scales)}"
            )

    @property
    def coefficients(self) -> tuple[float, ...]:
        """c_i; they sum to one."""
        return tuple(
            math.prod(other / (other - x) for j, other in enumerate(self.scales) if j != i)
            for i, x in enumerate(self.scales)
        )

    def experiments(self, noise, shots):
        found = []
        for x, c, part in zip(self.scales, self.coefficients, self._shared_out(shots), strict=True):
            steps = noise.repeated(x)
            times = int(x) if x == int(x) else None
            found.append(Experiment(part, lambda p, s=steps: noise.through(p, s), lambda f, c=c: c * f, times))
        return found

    def _shared_out(self, shots):
        """Shots per scale, at least one each, in all `shots`."""
        count = len(self.scales)
        if shots is None:
            return [None] * count
        if shots < count:
            raise UsageError(f"zne with {count} scales needs at least {count} shots, got {shots}")
        total = sum(map(abs, self.coefficients))
        wanted = [1 + (shots - count) * abs(c) / total for c in self.coefficients]
        parts = [math.floor(w) for w in wanted]
        rest = sorted(range(count), key=lambda i: parts[i] - wanted[i])[: shots - sum(parts)]
        return [part + (i in rest) for i, part in enumerate(parts)]

    def overhead(self, noise):
        return sum(map(abs, self.coefficients)) ** 2

    def __str__(self):
        return "zne" if self.scales == (1, 2, 3) else f"zne:{_listed(self.scales)}"


@dataclass(frozen=True)
class ErrorCancellation(Mitigation):
    """Probabilistic error cancellation (Temme, Bravyi, Gambetta, 2017): unbiased.

    Each shot puts a random operation of each qubit (I, X, Y, Z, reset) in front of the noise, with the absolute values of
    the quasi-probabilities of the inverse channel, and counts gamma times the product of their signs. A shot's sign and
    outcome have a joint distribution in closed form, and that is what is sampled here.
    """

    def experiments(self, noise, shots):
        eta = quasi_probabilities(noise)
        total = gamma(eta).prod()

        def rows(p):
            absolute, exact = noise.through(p, [noisy_operations(noise, eta)]), noise.noiseless(p) / total.to(p.device)
            return torch.cat([absolute + exact, absolute - exact], -1).clamp(min=0) / 2

        def read(frequencies):
            plus, minus = frequencies.chunk(2, -1)
            return total.to(plus.device) * (plus - minus)

        return [Experiment(shots, rows, read)]

    def overhead(self, noise):
        return float(gamma(quasi_probabilities(noise)).prod()) ** 2

    def __str__(self):
        return "pec"


@dataclass(frozen=True)
class RepetitionCode(Mitigation):
    """Every qubit held by `distance` qubits that are read by majority: error correction, with `distance` times the qubits.

    A flip of rate f becomes one of rate sum_{k > d/2} C(d, k) f^k (1 - f)^(d - k). It helps where f < 1/2, against flips in
    the basis z; phases are not protected.

    Attributes:
        distance: an odd number up to 999.
    """

    distance: int = 3

    def __post_init__(self):
        if not 1 <= whole("repetition distance", self.distance) <= LARGEST_DISTANCE or self.distance % 2 == 0:
            raise UsageError(f"repetition distance must be an odd number in 1 to {LARGEST_DISTANCE}, got {self.distance}")

    def experiments(self, noise, shots):
        for model in noise.channels:
            if model.channel not in ("depolarizing", "bit_flip"):
                raise UsageError(
                    f"repetition corrects flips (depolarizing, bit_flip, readout), got {model.channel}; take "
                    "readout_inversion"
                )
        if noise.basis != "z":
            raise UsageError("repetition protects no phase: basis must be z, got x; take readout_inversion")
        step = noise.local("repetition")
        up, down = (majority(rate, self.distance) for rate in (step[:, 1, 0], step[:, 0, 1]))
        logical = matrices_of([[1 - up, down], [up, 1 - down]])
        return [Experiment(shots, lambda p: noise.through(p, [logical]), lambda f: f)]

    def qubits(self, noise):
        return self.distance * noise.qubits

    def __str__(self):
        return f"repetition:{self.distance}"


def _inverse(step: torch.Tensor) -> torch.Tensor:
    """S^-1 of each qubit, or 1 / (1 - l) of noise on all qubits as one, which leaves p / (1 - l) - l / (1 - l) uniform."""
    return inverse_matrices(step) if step.ndim else 1 / kept_strength(1 - step, "the register")


def majority(rate: torch.Tensor, distance: int) -> torch.Tensor:
    """The rate at which most of `distance` independent copies are flipped: sum_{k > d/2} C(d, k) f^k (1 - f)^(d - k)."""
    counts = range(distance // 2 + 1, distance + 1)
    terms = (float(math.comb(distance, k)) * rate**k * (1 - rate) ** (distance - k) for k in counts)
    return sum(terms)


def project_on_simplex(x: torch.Tensor) -> torch.Tensor:
    """The nearest probabilities, Euclidean, to rows (..., n): max(x - t, 0), t such that they sum to one (Held, Wolfe and
    Crowder, 1974). Rows of zeros stay so."""
    ordered = x.sort(-1, descending=True).values
    t = (ordered.cumsum(-1) - 1) / torch.arange(1, x.shape[-1] + 1, device=x.device)
    last = (ordered > t).sum(-1, keepdim=True) - 1
    return (x - t.gather(-1, last)).clamp(min=0).masked_fill((x == 0).all(-1, keepdim=True), 0)


def _listed(scales) -> str:
    return "-".join(f"{x:g}" for x in scales)
