"""What measuring rows on other packages has in common: the checks, and attention by it as a backend of `qexport.nn`."""

from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np
import torch

from qexport.arguments import as_seed, check_tensors, whole
from qexport.errors import UsageError
from qexport.hardware.circuit import rotations
from qexport.hardware.noise import check_noise
from qexport.nn.backends import AttentionCall, reference
from qexport.noise.channels import num_qubits
from qexport.noise.model import NoiseModel, as_models
from qexport.ops.probability_rows import check_rows
from qexport.ops.quantum_noise import SPEC


def check_basis(basis: str) -> None:
    """Raise where a basis is none of QuantumNoise.

    Raises:
        UsageError: names the known ones.
    """
    SPEC.resolve({"basis": basis})


def checked_rows(probabilities: torch.Tensor, least: int, axes: int | None = None) -> torch.Tensor:
    """Rows of probabilities as float64 on the CPU, that sum to one exactly; rows of zeros stay so.

    Args:
        probabilities: (..., n), of any floating type.
        least: the smallest n that is taken.
        axes: how many there must be; None for any.

    Raises:
        UsageError: they are no rows of probabilities.
    """
    check_tensors({"probabilities": probabilities})
    if axes is not None and probabilities.ndim != axes:
        raise UsageError(f"probabilities must have {axes} axis, got {probabilities.ndim}; give one row at a time")
    check_rows("hardware", probabilities, least)
    rows = probabilities.detach().double().cpu()
    return rows / rows.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def check_size(qubits: int, available: int) -> None:
    """Raise where a device is too small.

    Raises:
        UsageError: names both numbers.
    """
    if available < qubits:
        raise UsageError(f"rows of {qubits} qubits need a device with as many, got {available}; take a larger one")


class RowBackend(ABC):
    """Measures rows of probabilities on a package's simulator or a device.

    Called as a backend of `quantum_attention` it measures each query's row `num_samples` times (strategy `naive`; `exact`
    is left to the reference) and multiplies the frequencies with V. `control_variate` has nothing to do then.

    Subclasses have `name`, `device` (None: their simulator) and `_frequencies`.
    """

    name: str
    device = None

    def __call__(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        a = call.attributes
        if a["strategy"] == "exact":
            return reference(call)
        if a["strategy"] != "naive" or call.dropout_p:
            raise UsageError(
                f"backend {self.name} measures strategy naive with dropout_p 0, got {a['strategy']} with {call.dropout_p:g}"
                "; set them so, or take backend auto"
            )
        exact = replace(call, attributes=a | {"strategy": "exact", "error_tolerance": 0.0}, need_weights=True)
        _, weights = reference(exact)
        V = call.V.unflatten(-1, (a["kv_num_heads"], -1)).transpose(1, 2) if call.V.dim() == 3 else call.V
        V = V.repeat_interleave(weights.shape[1] // V.shape[1], 1)
        shots = torch.tensor(a["num_samples"]).expand(weights.shape[1])
        Y = weights.new_empty(*weights.shape[:3], V.shape[-1])
        for count in shots.unique().tolist():
            heads = shots == count
            # Layers and heads draw by themselves.
            (seed,) = np.random.SeedSequence((call.seed % 2**64, a["layer"], count)).generate_state(1).tolist()
            f = self.measure_rows(weights[:, heads], count, seed=seed)
            Y[:, heads] = (f.double() @ V[:, heads].double()).to(Y.dtype)
        Y = Y.transpose(1, 2).flatten(2) if call.V.dim() == 3 else Y
        return Y, weights if call.need_weights else None

    def measure_rows(
        self,
        probabilities: torch.Tensor,
        shots: int,
        noise: tuple[NoiseModel, ...] = (),
        *,
        basis: str = "z",
        seed: int = 0,
    ) -> torch.Tensor:
        """How often each outcome is found when every row is prepared and measured `shots` times.

        Args:
            probabilities: (..., n) rows that sum to one, or of zeros, which are not measured and stay so.
            shots: measurements of each row.
            noise: models that meet the prepared state in this order, as channels of the package. On a device it must be
                empty: the noise is the device's own.
            basis: `z`, or `x` for a Hadamard gate on every qubit behind the noise.
            seed: of a simulator's draws; a device has none.

        Returns:
            Shares of the shots, of the shape and type of `probabilities`. What is missing from 1 was measured in states
            n .. 2^qubits - 1.

        Raises:
            UsageError: rows, shots, noise or a basis that is refused.
        """
        check_basis(basis)
        shots = whole("shots", shots)
        noise = as_models(noise)
        if noise and self.device is not None:
            words = ", ".join(model.channel for model in noise)
            raise UsageError(f"a device has noise of its own, got {words}; leave noise out, or take the simulator")
        p = checked_rows(probabilities, least=1)
        n = p.shape[-1]
        qubits = num_qubits(n)
        check_noise(noise, qubits)
        if qubits == 0:
            return probabilities.clone()
        rows = p.reshape(-1, n)
        some = rows.any(-1)
        found = torch.zeros(len(rows), 1 << qubits, dtype=torch.float64)
        if some.any():
            (seed,) = np.random.SeedSequence(as_seed(seed) % 2**64).generate_state(1).tolist()
            angles = rotations(rows[some]).numpy()
            found[some] = torch.from_numpy(self._frequencies(qubits, angles, shots, noise, basis, seed))
        return found[:, :n].reshape(probabilities.shape).to(probabilities)

    @abstractmethod
    def _frequencies(self, qubits: int, angles: np.ndarray, shots: int, noise, basis: str, seed: int) -> np.ndarray:
        """Shares (rows, 2^qubits) of the outcomes, from the angles (rows, 2^qubits - 1) of `preparation`; seed < 2^32."""
