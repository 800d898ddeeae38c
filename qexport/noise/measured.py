"""Rows of probabilities behind noise, measured: by the kernels where they can, else in torch, with the same draws.

The noise of any sequence of models is one 2 x 2 matrix per qubit (and a number for noise on all qubits as one system), in
either basis; mitigation is arithmetic on these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qexport.arguments import as_seed, check_tensors, whole
from qexport.errors import UsageError
from qexport.noise.channels import (
    amplitudes_of,
    apply_transitions,
    global_share,
    num_qubits,
    transition_matrices,
    walsh_hadamard,
)
from qexport.noise.model import NoiseModel, as_models
from qexport.ops.kernels import kernels
from qexport.ops.quantum_measure_ref import quantum_measure_ref
from qexport.ops.quantum_noise import SPEC

# `readout` with two rates per qubit is any transition matrix, in either basis.
ANY_MATRIX = {basis: SPEC.resolve({"channel": "readout", "basis": basis}) for basis in ("z", "x")}


class MeasuredNoise:
    """Noise models that act one after the other on registers of n states, before these are measured in a basis.

    Attributes:
        channels, readouts: (NoiseModel, ...): those that act on states, the first first, and those of the measurement.
        n, qubits: states in use, and the qubits that hold them.
        basis: z or x.
        steps: what all of them do to measured probabilities, neighbours composed: float64 (qubits, 2, 2), transition
            probabilities of each qubit, or (), the share of all qubits that becomes the mixed state.

    Raises:
        UsageError: a parameter outside its limits, or readout that is not the last.
    """

    def __init__(self, models: Sequence[NoiseModel], n: int, basis: str = "z", *, kernel: bool = False):
        """kernel: whether the C++ kernels compute where no gradient is asked for; rows must then be on the CPU."""
        if basis not in ANY_MATRIX:
            raise UsageError(f"basis must be one of {', '.join(ANY_MATRIX)}, got {basis!r}")
        models = as_models(models)
        self.n, self.qubits, self.basis, self.kernel = whole("n", n), num_qubits(n), basis, kernel
        self.channels = tuple(model for model in models if model.channel != "readout")
        self.readouts = models[len(self.channels) :]
        for model in self.readouts:
            if model.channel != "readout":
                raise UsageError(f"readout acts on what was measured and must come last, got {model.channel} behind it")
        self._parts = self._composed(self.channels), self._composed(self.readouts)
        self.steps = [step for part in self._parts for step in part]

    def _composed(self, models) -> list[torch.Tensor]:
        steps = []
        for model in models:
            if model.scope == "global":
                steps.append(global_share(model.convention, model.level, self.qubits))
                continue
            given = {**model.inputs, "convention": model.convention, "basis": self.basis}
            step = transition_matrices(model.channel, self.qubits, **given)
            steps.append(step @ steps.pop() if steps and steps[-1].ndim else step)
        return steps

    def local(self, why: str) -> torch.Tensor:
        """The transition matrices of all steps together, float64 (qubits, 2, 2).

        Raises:
            UsageError: noise of scope global; the message begins with `why`.
        """
        whole = torch.eye(2, dtype=torch.float64).expand(self.qubits, 2, 2)
        for step in self.steps:
            if not step.ndim:
                raise UsageError(f"{why} takes noise of single qubits, got scope global; take scope local")
            whole = step @ whole
        return whole

    def repeated(self, times: float) -> list[torch.Tensor]:
        """The steps when channels, and then readouts, act `times` times as often.

        Raises:
            UsageError: a number of times that is no integer, for noise that has no such power.
        """
        return [step for part in self._parts for step in _power(part, times)]

    def repeated_models(self, times: int) -> tuple[NoiseModel, ...]:
        """The models of `repeated`."""
        return self.channels * times + self.readouts * times

    def noiseless(self, p: torch.Tensor) -> torch.Tensor:
        """What would be measured without noise: (..., 2^q) of rows p (..., n)."""
        return self.through(p, [])

    def probabilities(self, p: torch.Tensor) -> torch.Tensor:
        """What is measured: (..., 2^q) of rows p (..., n)."""
        return self.through(p, self.steps)

    def through(self, p: torch.Tensor, steps) -> torch.Tensor:
        """What is measured behind `steps`, shaped as `self.steps`: (..., 2^q) of float64 rows p (..., n), n the states in
        use.

        Differentiable in p and steps.
        """
        check_tensors({"p": p})
        p = torch.nn.functional.pad(p, (0, (1 << self.qubits) - p.shape[-1]))
        basis = self.basis
        if basis == "x" and (not steps or not steps[0].ndim):  # the change of basis needs a step to go with
            steps = [torch.eye(2, dtype=p.dtype).expand(self.qubits, 2, 2), *steps]
        for step in steps:
            if step.ndim:
                p = self._transitions(p, step, basis)
            else:
                step = step.to(p.device)
                p = (1 - step) * p + step * p.sum(-1, keepdim=True) / p.shape[-1]
            basis = "z"
        return p

    def _transitions(self, p, matrices, basis):
        asked = torch.is_grad_enabled() and (p.requires_grad or matrices.requires_grad)
        if self.kernel and not asked and self.qubits:
            flips = torch.stack([matrices[:, 1, 0], matrices[:, 0, 1]], -1).detach().clamp(0, 1)
            threads = torch.get_num_threads()
            noisy, _ = kernels().quantum_noise(p.detach().numpy(), flips.numpy(), **ANY_MATRIX[basis], threads=threads)
            return torch.from_numpy(noisy)
        if basis == "x":
            p = walsh_hadamard(amplitudes_of(p)).square()
        return apply_transitions(p, matrices.to(p.device))


def _power(steps: list[torch.Tensor], times: float) -> list[torch.Tensor]:
    """S^times = I + (1 - x^times) / (1 - x) (S - I), x = 1 - S_10 - S_01."""
    if times == int(times):
        return steps * int(times)
    if len(steps) > 1:
        raise UsageError(f"noise of {len(steps)} steps can be repeated whole times alone, got {times:g} times")
    powers = []
    for step in steps:
        lost = step[:, 1, 0] + step[:, 0, 1] if step.ndim else step
        if (lost >= 1).any():
            raise UsageError(f"noise that turns outcomes over can be repeated whole times alone, got {times:g} times")
        if step.ndim:
            some = torch.where(lost > 0, lost, 0.5)
            factor = torch.where(lost > 0, -torch.expm1(times * torch.log1p(-some)) / some, times)[:, None, None]
            one = torch.eye(2, dtype=step.dtype)
            powers.append((one + factor * (step - one)).clamp(min=0))
        else:
            powers.append(1 - (1 - step) ** times)
    return powers


def measured(rows: torch.Tensor, shots: int | None, seed: int, layer: int = 0, *, kernel: bool = False) -> torch.Tensor:
    """Frequencies of `shots` measurements of float64 rows (..., m); the rows themselves where shots is None.

    The frequencies carry the gradient f w / w.detach() of rows w. It is unbiased, since E f_i = w_i:
    E sum_i g_i f_i dw_i / w_i = sum_i g_i dw_i, the gradient of the expectation of sum_i g_i f_i for constants g.

    Raises:
        UsageError: rows that are no probabilities, shots below 1, or a seed that is no int64.
    """
    check_tensors({"rows": rows})
    if shots is None:
        return rows
    w, seed = rows.detach(), as_seed(seed)
    if kernel:
        threads = torch.get_num_threads()
        f = torch.from_numpy(kernels().quantum_measure(w.numpy(), seed, shots=shots, layer=layer, threads=threads))
    else:
        f = quantum_measure_ref(w, seed, shots=shots, layer=layer)
    return with_gradient(f, rows)


def with_gradient(frequencies: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The frequencies with the gradient of `measured`; an outcome of probability 0, never found, has none."""
    if not rows.requires_grad:
        return frequencies
    return frequencies * (rows / rows.detach().masked_fill(rows == 0, 1))
