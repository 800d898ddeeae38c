"""Runs the noisy models of a sweep and holds them against the classical one, batch by batch.

Cells that differ in nothing but their levels share their sessions: levels are multiplied by an input of the model.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qexport import runtime
from qexport.bundle import Bundle
from qexport.errors import QexportError
from qexport.feeds import Inputs
from qexport.metrics import Metric
from qexport.recipe import make_recipe
from qexport.recipe_values import INFINITE
from qexport.resilience.cells import Cell
from qexport.rewrite import LeftAlone
from qexport.rewrite.classical import to_classical
from qexport.rewrite.sample_attention import sample_attention
from qexport.validation.comparison import seeded_feed
from qexport.validation.probes import add_outputs, open_probe, ordered_sites, watch
from qexport.validation.unpadded import as_floats, keep_masks, padded_axis, rows


@dataclass
class Values:
    """What one cell gave, one number per seed: the metric, its loss, the error of the metric's output, and the mean of the
    errors of the attentions; `worst_site` is the attention that errs most."""

    figures: np.ndarray
    losses: np.ndarray
    output_errors: np.ndarray
    attention_errors: np.ndarray
    worst_site: dict


@dataclass
class Found:
    """`values` of each cell; `classical` is the classical model's figure, `sites` how many attentions are noisy."""

    values: list[Values]
    classical: float
    sites: int
    left_alone: list[LeftAlone]


@dataclass
class _Models:
    """Open sessions: the classical model, and noisy ones by their shots; `outputs` are the metric's and those of `sites`,
    the attentions that can be watched, of `count`."""

    classical: object
    noisy: dict
    outputs: list[str]
    sites: list[dict]
    count: int
    left_alone: list[LeftAlone]
    scale_input: str
    seed_input: str

    @property
    def symbols(self) -> list:
        """The shapes of `outputs` as onnxruntime names them."""
        shapes = {output.name: output.shape for output in self.classical.get_outputs()}
        return [shapes[name] for name in self.outputs]


@dataclass
class _Sums:
    """What one cell adds up over the batches: the metric, (seeds,), over `count` rows; and of the metric's output and every
    attention the squared norms of the error, (values, seeds), and of the classical value, (values,)."""

    total: np.ndarray
    error: np.ndarray
    base: np.ndarray
    count: int = 0


def measure_cells(
    bundle: Bundle, inputs: Inputs, cells: list[Cell], metric: Metric, seeds: int, *, library, where: dict, say
) -> Found:
    """Run every cell on every input, `seeds` times where shots are drawn, in sessions with the arguments `where`.

    Raises:
        QexportError: a model does not load or run, or no attention can be noisy.
    """
    groups: dict[tuple, list[int]] = {}
    for i, cell in enumerate(cells):
        groups.setdefault((cell.noise, cell.invert, *(run.shots for run in cell.runs)), []).append(i)
    done, everything = 0, sum(len(_seeds(cell, seeds)) * len(cell.runs) for cell in cells) * len(inputs.feeds)
    values = {}
    for members in groups.values():
        with ExitStack() as stack:
            models = _open(stack, bundle, cells[members[0]], metric, library, where)
            sums = {i: _new_sums(cells[i], seeds, len(models.outputs)) for i in members}
            total = 0.0
            for feed in inputs.feeds:
                classical = runtime.run(models.classical, models.outputs, feed)
                masks = keep_masks(bundle.manifest, feed)
                kept = [padded_axis(c.shape, s, masks) for c, s in zip(classical, models.symbols, strict=True)]
                total += metric.add(bundle.manifest, feed, classical[0], classical[0])[0]
                for i in members:
                    cell = cells[i]
                    say(f"{cell.mitigation}, {cell.shots} shots, level {cell.level:g}", done / everything)
                    runs = (_run(cell, models, feed, seed) for seed in _seeds(cell, seeds))
                    _add(sums[i], bundle, metric, feed, classical, kept, runs)
                    done += len(_seeds(cell, seeds)) * len(cell.runs)
            figure = float(metric.mean(total, sums[members[0]].count))
            values |= {i: _values(sums[i], metric, figure, models.sites) for i in members}
    return Found([values[i] for i in range(len(cells))], figure, models.count, models.left_alone)


def noisy_model(bundle: Bundle, noise: str, shots, invert: bool):
    """The classical model with noisy attention: (proto, its sites, what is left alone, the names of the scale and the seed).

    It takes the op library: the fallback functions are not there.

    Raises:
        QexportError: no attention can be noisy.
    """
    model = ir.load(bundle.classical_path)
    opset = model.opset_imports[""]
    left_alone = to_classical(model, opset) if opset < 23 else []
    sites, more = sample_attention(model, make_recipe(noise=noise, shots=shots), invert=invert)
    left_alone = [*left_alone, *more]
    if not sites:
        why = f"; {left_alone[0].name}: {left_alone[0].reason}" if left_alone else ""
        raise QexportError(f"{bundle.path}: has no attention that can be noisy{why}")
    return ir.to_proto(model), sites, left_alone, [value.name for value in model.graph.inputs[-2:]]


def _open(stack: ExitStack, bundle: Bundle, cell: Cell, metric: Metric, library, where) -> _Models:
    """The sessions that a cell, and those that differ from it in their level alone, run in."""
    path, noisy = bundle.classical_path, {}
    for shots in dict.fromkeys(run.shots for run in cell.runs):
        model, sites, left_alone, names = noisy_model(bundle, cell.noise, shots, cell.invert)
        watched = ordered_sites(model, [site.to_dict() for site in sites])
        if not watched:
            raise QexportError(f"{bundle.path}: its attentions lie in subgraphs, where they cannot be watched")
        add_outputs(model, [site["output"] for site in watched])
        noisy[shots] = stack.enter_context(open_probe(model, path, library=library, **where))
    classical = stack.enter_context(open_probe(watch(path, watched), path, library=False, **where))
    outputs = [metric.output, *(site["output"] for site in watched)]
    return _Models(classical, noisy, outputs, watched, len(sites), left_alone, *names)


def _seeds(cell: Cell, seeds: int) -> range:
    """Infinitely many shots draw nothing."""
    return range(1 if cell.shots == INFINITE else seeds)


def _new_sums(cell: Cell, seeds: int, outputs: int) -> _Sums:
    count = len(_seeds(cell, seeds))
    return _Sums(np.zeros(count), np.zeros((outputs, count)), np.zeros(outputs))


def _add(sums: _Sums, bundle: Bundle, metric: Metric, feed: dict, classical: list, kept: list, runs) -> None:
    """Add one batch: the outputs of each seed in `runs`."""
    sums.base += [_square(as_floats(rows(c, keep), [])[0]) for c, keep in zip(classical, kept, strict=True)]
    for seed, run in enumerate(runs):
        total, count = metric.add(bundle.manifest, feed, classical[0], run[0])
        sums.total[seed] += total
        for number, (y, c, keep) in enumerate(zip(run, classical, kept, strict=True)):
            base, (value,) = as_floats(rows(c, keep), [rows(y, keep)])
            sums.error[number, seed] += _square(value - base)
    sums.count += count


def _square(values: np.ndarray) -> float:
    """The squared norm, in float64 a part at a time: logits are large."""
    return sum(float(np.vdot(part, part)) for part in (part.astype(np.float64) for part in values))


def _run(cell: Cell, models: _Models, feed: dict, seed: int) -> list[np.ndarray]:
    """The outputs of one seed; every run of a cell draws by itself."""
    total = None
    for number, run in enumerate(cell.runs):
        fed = seeded_feed(feed, models.seed_input, seed * len(cell.runs) + number)
        fed[models.scale_input] = np.array(run.scale, np.float32)
        found = runtime.run(models.noisy[run.shots], models.outputs, fed)
        if len(cell.runs) == 1:
            return found
        weighted = [np.float32(run.weight) * value.astype(np.float32) for value in found]
        total = weighted if total is None else [a + b for a, b in zip(total, weighted, strict=True)]
    return total


def _values(sums: _Sums, metric: Metric, classical: float, sites: list[dict]) -> Values:
    figures = metric.mean(sums.total, sums.count)
    output_errors, *errors = np.sqrt(sums.error / np.maximum(sums.base, np.finfo(float).tiny)[:, None])
    errors = np.array(errors)
    worst = int(errors.mean(axis=1).argmax())
    where = {key: sites[worst][key] for key in ("name", "layer", "module")}
    return Values(
        figures=figures,
        losses=metric.loss(figures, classical),
        output_errors=output_errors,
        attention_errors=errors.mean(axis=0),
        worst_site=where | {"relative_error": float(errors[worst].mean())},
    )
