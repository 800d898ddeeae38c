"""Error mitigation and correction of measured rows (docs/noise.md, "Mitigation and correction").

Every method measures some experiments and adds up what it reads from them, linearly; it shares a total number of shots out
among them. The methods are in `methods`, and public here.
"""

import torch

from qexport.arguments import as_seed, check_tensors, whole, wrapped_seed
from qexport.errors import UsageError
from qexport.noise.measured import MeasuredNoise, measured, with_gradient
from qexport.noise.methods import (
    ErrorCancellation,
    Experiment,
    Mitigation,
    ReadoutInversion,
    RepetitionCode,
    ZeroNoiseExtrapolation,
)

__all__ = [
    "ErrorCancellation",
    "Experiment",
    "Mitigation",
    "ReadoutInversion",
    "RepetitionCode",
    "ZeroNoiseExtrapolation",
    "mitigated",
    "parse_mitigation",
]


def parse_mitigation(text: str) -> Mitigation:
    """The method of a text: none, readout_inversion[:project], zne[:SCALE-SCALE-..], pec or repetition[:DISTANCE].

    Raises:
        UsageError: an unknown method, or settings that it does not have.
    """
    if not isinstance(text, str):
        raise UsageError(f"mitigation must be a text such as zne, got {text!r}")
    name, _, setting = text.partition(":")
    try:
        if name == "readout_inversion" and setting in ("", "project"):
            return ReadoutInversion(project=bool(setting))
        if name == "zne":
            return ZeroNoiseExtrapolation(tuple(map(float, setting.split("-")))) if setting else ZeroNoiseExtrapolation()
        if name == "repetition":
            return RepetitionCode(int(setting)) if setting else RepetitionCode()
    except ValueError:
        pass
    if text in ("none", "pec"):
        return Mitigation() if text == "none" else ErrorCancellation()
    known = "none, readout_inversion[:project], zne[:1-2-3], pec, repetition[:3]"
    raise UsageError(f"mitigation must be one of {known}, got {text!r}")


def mitigated(mitigation: Mitigation, noise: MeasuredNoise, p, shots: int | None, seed: int = 0, *, device=None):
    """What a method says a device without noise would measure.

    Args:
        mitigation: the method.
        noise: of the device; the method knows it.
        p: float64 (..., n), rows of probabilities.
        shots: measurements of each row in all; None: infinitely many.
        seed: of the draws.
        device: measure_rows of a hardware backend, in place of closed forms and draws.

    Returns:
        float64 (..., 2^q), unbiased up to what the method's own bias is; may be negative. Differentiable as `measured`.

    Raises:
        UsageError: the method does not apply to this noise, has too few shots, or needs what the device cannot do; or an
            argument is of another kind.
    """
    check_tensors({"p": p})
    if not isinstance(mitigation, Mitigation):
        raise UsageError(f"mitigation must be a Mitigation, as parse_mitigation makes it, got {mitigation!r}")
    if shots is not None:
        whole("shots", shots)
    estimate, experiments, seed = 0, mitigation.experiments(noise, shots), as_seed(seed)
    for layer, experiment in enumerate(experiments):
        if device is None:
            found = measured(experiment.rows(p), experiment.shots, seed, layer, kernel=noise.kernel)
        else:
            found = _on_device(device, mitigation, experiment, noise, p, wrapped_seed(seed * len(experiments) + layer))
        estimate = estimate + experiment.read(found)
    return mitigation.finish(estimate)


def _on_device(device, mitigation: Mitigation, experiment: Experiment, noise, p, seed):
    if experiment.times is None:
        raise UsageError(f"hardware cannot do mitigation {mitigation}; take zne with whole scales, or backend auto")
    padded = torch.nn.functional.pad(p.detach(), (0, (1 << noise.qubits) - p.shape[-1]))
    found = device(padded, experiment.shots, noise.repeated_models(experiment.times), basis=noise.basis, seed=seed)
    rows = experiment.rows(p) if torch.is_grad_enabled() else p.detach()
    return with_gradient(found.to(p), rows)
