"""Rows of probabilities behind noise, measured: by the kernels where they can, else in torch, with the same draws.

The noise of any sequence of models is one 2 x 2 matrix per qubit (and a number for noise on all qubits as one system), in
either basis; mitigation is arithmetic on these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qexport.errors import UsageError
from qexport.noise.channels import (
    amplitudes_of,
    apply_transitions,
    global_share,
    num_qubits,
    transition_matrices,
    walsh_hadamard,
)
from qexport.noise.model import NoiseModel
from qexport.ops.kernels import kernels
from qexport.ops.quantum_measure_ref import quantum_measure_ref


class MeasuredNoise:
    """Noise models that act one after the other on registers of n states, before these are measured in a basis.

    Attributes:
        models: (NoiseModel, ...), the first acts first.
        n, qubits: states in use, and the qubits that hold them.
        basis: z or x.
        steps: what the models do to measured probabilities, neighbours composed: float64 (qubits, 2, 2), transition
            probabilities of each qubit, or (), the share of all qubits that becomes the mixed state.

    Raises:
        UsageError: a parameter outside its limits, or readout that is not the last.
    """

    def __init__(self, models: Sequence[NoiseModel], n: int, basis: str = "z", *, kernel: bool = False):
        """kernel: whether the C++ kernels compute where no gradient is asked for; rows must then be on the CPU."""
        self.models, self.n, self.qubits, self.basis, self.kernel = tuple(models), n, num_qubits(n), basis, kernel
        self.steps = []
        for before, model in zip((None, *self.models), self.models, strict=False):
            if before is not None and before.channel == "readout" and model.channel != "readout":
                raise UsageError(f"readout acts on what was measured and must come last, got {model.channel} behind it")
            self._then(model)

    def _then(self, model: NoiseModel) -> None:
        if model.scope == "global":
            self.steps.append(global_share(model.convention, model.level, self.qubits))
            return
        given = {**model.inputs, "convention": model.convention, "basis": self.basis}
        step = transition_matrices(model.channel, self.qubits, **given)
        if self.steps and self.steps[-1].ndim:
            step = step @ self.steps.pop()
        self.steps.append(step)

    def local(self, why: str) -> torch.Tensor:
        """The transition matrices of all models together, float64 (qubits, 2, 2).

        Raises:
            UsageError: noise of scope global; the message begins with `why`.
        """
        if any(not step.ndim for step in self.steps):
            raise UsageError(f"{why} takes noise of single qubits, got scope global; take scope local")
        return self.steps[0] if self.steps else torch.eye(2, dtype=torch.float64).expand(self.qubits, 2, 2)

    def repeated(self, times: float) -> list[torch.Tensor]:
        """The steps of the noise acting `times` times: S^times = I + (1 - x^times) / (1 - x) (S - I), x = 1 - S_10 - S_01.

        Raises:
            UsageError: a number of times that is no integer, for noise that has no such power.
        """
        if times == int(times):
            return self.steps * int(times)
        if len(self.steps) != 1:
            raise UsageError(f"noise of {len(self.steps)} steps can be repeated whole times alone, got {times:g} times")
        (step,) = self.steps
        lost = step[:, 1, 0] + step[:, 0, 1] if step.ndim else step
        if (lost >= 1).any():
            raise UsageError(f"noise that turns outcomes over can be repeated whole times alone, got {times:g} times")
        if not step.ndim:
            return [1 - (1 - step) ** times]
        some = torch.where(lost > 0, lost, 0.5)
        factor = torch.where(lost > 0, -torch.expm1(times * torch.log1p(-some)) / some, times)[:, None, None]
        return [(torch.eye(2, dtype=step.dtype) + factor * (step - torch.eye(2, dtype=step.dtype))).clamp(min=0)]

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
            # `readout` with two rates per qubit is any transition matrix, in either basis.
            attributes = {"channel": "readout", "scope": "local", "convention": "replace", "basis": basis, "renormalize": 0}
            noisy, _ = kernels().quantum_noise(
                p.detach().numpy(), flips.numpy(), **attributes, threads=torch.get_num_threads()
            )
            return torch.from_numpy(noisy)
        if basis == "x":
            p = walsh_hadamard(amplitudes_of(p)).square()
        return apply_transitions(p, matrices.to(p.device))


def measured(rows: torch.Tensor, shots: int | None, seed: int, layer: int = 0, *, kernel: bool = False) -> torch.Tensor:
    """Frequencies of `shots` measurements of float64 rows (..., m); the rows themselves where shots is None.

    The frequencies carry the gradient f w / w.detach() of rows w. It is unbiased, since E f_i = w_i:
    E sum_i g_i f_i dw_i / w_i = sum_i g_i dw_i, the gradient of the expectation of sum_i g_i f_i for constants g.
    """
    if shots is None:
        return rows
    w = rows.detach()
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
