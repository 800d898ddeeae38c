"""What each cell of a sweep runs: how mitigation turns a level and a number of shots into runs of a noisy model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qexport.errors import UsageError
from qexport.noise.model import NoiseModel
from qexport.recipe_values import INFINITE

NO_MITIGATION = "none"
SWEPT = ("zne", "repetition", "readout_inversion")
# Channels that flip a measured qubit either way at one rate, so that several of them are one flip.
FLIPS = ("depolarizing", "bit_flip", "readout")
_NOT_SWEPT = f"is not swept in models; give {NO_MITIGATION}, zne, repetition:3 or readout_inversion"


@dataclass(frozen=True)
class Run:
    """One run of a model: `scale` multiplies its levels, which are 1, and the outputs count `weight` times."""

    scale: float
    weight: float
    shots: int | str


@dataclass(frozen=True)
class Cell:
    """A mitigation at one level and number of shots.

    Attributes:
        noise: of the model, levels 1, as a recipe takes it.
        runs: their weighted outputs add up to the cell's.
        invert: the noise is taken off what was measured, in the model.
    """

    mitigation: str
    level: float
    shots: int | str
    noise: str
    runs: tuple[Run, ...]
    invert: bool = False


def make_cell(mitigation: str, models: Sequence[NoiseModel], level: float, shots: int | str) -> Cell:
    """The cell of a mitigation, as `qexport.noise.mitigation` names it.

    Raises:
        UsageError: the mitigation is unknown or does not apply to the noise, a level that it needs is outside the limits of
            its channel, or the shots are too few.
    """
    if mitigation == NO_MITIGATION:
        return Cell(mitigation, level, shots, _text(models), (Run(_checked(models, level), 1.0, shots),))
    if str(mitigation).partition(":")[0] not in SWEPT:
        raise UsageError(f"mitigation {mitigation} {_NOT_SWEPT}")
    from qexport.noise.measured import MeasuredNoise
    from qexport.noise.methods import RepetitionCode, ZeroNoiseExtrapolation, majority
    from qexport.noise.mitigation import parse_mitigation

    method = parse_mitigation(mitigation)
    measured = MeasuredNoise([model.at(_checked(models, level)) for model in models], 2)
    experiments = method.experiments(measured, None if shots == INFINITE else shots)
    if isinstance(method, ZeroNoiseExtrapolation):
        parts = zip(method.scales, method.coefficients, experiments, strict=True)
        runs = [Run(_checked(models, x * level, f", {x:g} times {level:g},"), c, e.shots or INFINITE) for x, c, e in parts]
        return Cell(mitigation, level, shots, _text(models), tuple(runs))
    if isinstance(method, RepetitionCode):
        rate = majority(measured.local(mitigation)[0, 1, 0], method.distance)
        return Cell(mitigation, level, shots, "bit_flip:1", (Run(float(rate), 1.0, shots),))
    if method.project:
        raise UsageError(f"mitigation {mitigation} {_NOT_SWEPT}")
    if len(models) == 1:
        return Cell(mitigation, level, shots, _text(models), (Run(level, 1.0, shots),), invert=True)
    if all(model.channel in FLIPS and model.scope == "local" for model in models):
        rate = float(measured.local(mitigation)[0, 1, 0])
        return Cell(mitigation, level, shots, "bit_flip:1", (Run(rate, 1.0, shots),), invert=True)
    raise UsageError(f"{mitigation} takes one noise model here, or several of {', '.join(FLIPS)}; give one")


def _text(models: Sequence[NoiseModel]) -> str:
    return ",".join(str(model.at(1.0)) for model in models)


def _checked(models: Sequence[NoiseModel], level: float, origin: str = "") -> float:
    """`level`, which every model allows; `origin` says in a message where it comes from."""
    for model in models:
        try:
            model.at(level).check_limits()
        except UsageError as error:
            raise UsageError(f"noise {model.channel} at level {level:g}{origin} is refused: {error}; lower it") from None
    return level
