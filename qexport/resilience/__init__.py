"""resilience: how noisy a device may be before a model breaks.

`measure_resilience` replaces every attention of a bundle's classical model by a noisy, measured one (docs/converting.md),
runs it at levels of noise x numbers of shots x ways of mitigation x seeds, and holds its task's figure against the classical
model's. The model is built in memory; the bundle stays as it is, and how it was converted does not matter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qexport import installed, runtime
from qexport.arguments import real, several, whole
from qexport.bundle import Bundle
from qexport.data import load_inputs
from qexport.documents import make_document
from qexport.errors import QexportError, UsageError
from qexport.manifest import package_version
from qexport.metrics import choose_metric
from qexport.noise.model import NoiseModel, as_models, parse_channels
from qexport.plotting import check_plot
from qexport.progress import listener
from qexport.providers import recorded
from qexport.recipe_values import INFINITE
from qexport.resilience import plot as picture
from qexport.resilience.cells import NO_MITIGATION, Cell, make_cell
from qexport.resilience.runs import measure_cells
from qexport.resilience.threshold import threshold
from qexport.validation.statistics import confidence_interval

LEVELS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
SHOTS = (128, 1024, INFINITE)
TOLERANCE = 0.01


@dataclass
class ResilienceReport:
    """What `measure_resilience` found; the attributes are the keys of its JSON, which docs/json_schema.md describes.

    Attributes:
        metric: `name`, `output` and the `classical` model's figure.
        cells: one dict per mitigation, number of shots and level.
        thresholds: one dict per mitigation and number of shots: the level up to which the loss is within the tolerance.
    """

    bundle: str
    settings: dict
    data: dict
    metric: dict
    sites: int
    left_alone: list[dict]
    cells: list[dict]
    thresholds: list[dict]
    notes: list[str]
    versions: dict
    seconds: float

    def to_dict(self) -> dict:
        """The report as plain data; figures that are not finite are None."""
        return make_document("resilience", self.__dict__)


def measure_resilience(
    bundle,
    data=None,
    *,
    noise: str | Sequence[NoiseModel] = "depolarizing",
    levels: Sequence[float] = LEVELS,
    shots: Sequence[int | str] = SHOTS,
    mitigation: Sequence[str] = (NO_MITIGATION,),
    seeds: int = 5,
    tolerance: float = TOLERANCE,
    metric: str | None = None,
    batch: int | None = None,
    seq: int | None = None,
    library=True,
    providers=None,
    allow_fallback=False,
    plot=None,
    progress=None,
) -> ResilienceReport:
    """Measure how much of its task a model keeps when its attention is computed by a noisy device.

    Args:
        bundle: a folder, or a `Bundle`.
        data, batch, seq: inputs, as for `qexport.validate`; one item per run where the model has no mask.
        noise: channels with their settings, such as "depolarizing,readout" or "thermal_relaxation:T1=1:T2=0.8"; all have the
            same level.
        levels: of the noise; 0 is always among them.
        shots: measurements of each row of attention; "inf" for the noisy probabilities themselves.
        mitigation: none, zne, repetition:D or readout_inversion, see `qexport.noise.mitigation`. zne runs the whole model at
            levels multiplied by 1, 2, 3, with the shots shared out among them, and adds up its outputs 3, -3, 1 times;
            repetition takes the flip rate that is left of the noise; readout_inversion takes the noise off every row that
            was measured.
        seeds: number of seeds, 0 .. seeds - 1, that draw; infinitely many shots need one run.
        tolerance: the loss that is acceptable, 0.01 for 1 %.
        metric: perplexity, top1 or cosine; what fits the model when None.
        library: True or a path of an op library: without it there is no noise.
        providers, allow_fallback: where all models run, as in `qexport.session`; the CPU when None.
        plot: a .png, .svg or .pdf to draw the report to; needs matplotlib.
        progress: called with the step in words and the share that is done, 0 to 1.

    Raises:
        UsageError: a wrong argument; a level outside the limits of its channel, or of what a mitigation makes of it;
            `providers` as in `qexport.session`.
        QexportError: the bundle, the data, the op library, the runtime or its providers are at fault, or no attention can
            be noisy.
    """
    started, say = time.monotonic(), listener(progress)
    if not library:
        raise UsageError("library must be True or a path: without the op library there is no noise")
    if plot is not None:
        check_plot(plot)
    models = parse_channels(noise) if isinstance(noise, str) else as_models(several("noise", noise))
    cells = _cells(models, levels, shots, mitigation, seeds, tolerance)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    masked = any(spec["kind"] == "mask" for spec in opened.manifest["inputs"])
    inputs = load_inputs(opened, data, batch=batch if masked or batch or data is None else 1, seq=seq)
    say("running the classical model", 0.0)
    where = {"providers": providers, "allow_fallback": allow_fallback}
    chosen = choose_metric(opened, inputs, runtime.session(opened.classical_path, library=False, **where), metric)
    found = measure_cells(opened, inputs, cells, chosen, seeds, library=library, where=where, say=say)
    levels = sorted({cell.level for cell in cells})
    report = ResilienceReport(
        bundle=str(opened.path),
        settings={
            "noise": ",".join(_channel_text(model) for model in models),
            "levels": levels,
            "shots": list(dict.fromkeys(cell.shots for cell in cells)),
            "mitigation": list(dict.fromkeys(cell.mitigation for cell in cells)),
            "seeds": seeds,
            "tolerance": tolerance,
            **recorded(**where),
        },
        data={"source": inputs.source, "samples": inputs.samples, "notes": inputs.notes},
        metric={"name": chosen.name, "output": chosen.output, "classical": found.classical},
        sites=found.sites,
        left_alone=[entry.to_dict() for entry in found.left_alone],
        cells=[_cell_entry(cell, values) for cell, values in zip(cells, found.values, strict=True)],
        thresholds=_thresholds(cells, found.values, levels, tolerance),
        notes=[],
        versions={"qexport": package_version("qexport"), "onnxruntime": installed.onnxruntime().__version__},
        seconds=time.monotonic() - started,
    )
    if report.left_alone:
        report.notes.append(f"{len(report.left_alone)} attentions are computed without noise, as they cannot be measured")
    if plot is not None:
        picture.draw(report.to_dict(), plot)
    return report


def _cells(models, levels, shots, mitigation, seeds: int, tolerance: float) -> list[Cell]:
    """Every combination, checked, in the order in which it is run and shown."""
    whole("seeds", seeds)
    if not 0 < real("tolerance", tolerance) < math.inf:
        raise UsageError(f"tolerance must be a positive number, such as 0.01 for 1 %, got {tolerance}")
    for name, given in (("levels", levels), ("shots", shots), ("mitigation", mitigation)):
        if not several(name, given):
            raise UsageError(f"{name} must name at least one")
    if raised := next((model for model in models if model.level), None):
        raise UsageError(f"noise has its levels from `levels` here, got {raised}; give the model level 0")
    shots = [number if number == INFINITE else whole("shots", number) for number in shots]
    if most := next((number for number in shots if number != INFINITE and number >= 2**31), None):
        raise UsageError(f"shots must be whole numbers from 1 to {2**31 - 1}, or {INFINITE}, got {most}")
    levels = sorted({0.0, *(real("levels", level) for level in levels)})
    return [
        make_cell(method, models, level, number)
        for method in dict.fromkeys(mitigation)
        for number in dict.fromkeys(shots)
        for level in levels
    ]


def _channel_text(model: NoiseModel) -> str:
    channel, _, *settings = str(model).split(":")
    return ":".join([channel, *settings])


def _cell_entry(cell: Cell, values) -> dict:
    return {
        "mitigation": cell.mitigation,
        "shots": cell.shots,
        "level": cell.level,
        "runs": [{"scale": run.scale, "weight": run.weight, "shots": run.shots} for run in cell.runs],
        "metric": _summary(values.figures),
        "loss": _summary(values.losses),
        "attention_error": _summary(values.attention_errors),
        "output_error": _summary(values.output_errors),
        "worst_site": values.worst_site,
    }


def _summary(values: np.ndarray) -> dict:
    """Mean over the seeds with its 95 % interval (Student's t), None for one seed."""
    interval = confidence_interval(values)
    return {"mean": float(values.mean()), "ci95": list(interval) if interval else None, "per_seed": values.tolist()}


def _thresholds(cells: list[Cell], values: list, levels: list[float], tolerance: float) -> list[dict]:
    lines: dict[tuple, list] = {}
    for cell, found in zip(cells, values, strict=True):
        lines.setdefault((cell.mitigation, cell.shots), []).append(found.losses)
    return [
        {"mitigation": mitigation, "shots": shots, **threshold(levels, np.array(losses), tolerance)}
        for (mitigation, shots), losses in lines.items()
    ]


__all__ = ["LEVELS", "SHOTS", "QexportError", "ResilienceReport", "measure_resilience"]
