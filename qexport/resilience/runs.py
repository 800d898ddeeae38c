"""Runs the noisy models of a sweep and holds them against the classical one, batch by batch.

Cells that differ in nothing but their levels share their sessions: levels are multiplied by an input of the model.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from qexport import runtime
from qexport.bundle import Bundle
from qexport.errors import QexportError
from qexport.feeds import Inputs
from qexport.recipe import make_recipe
from qexport.recipe_values import INFINITE
from qexport.resilience.cells import Cell
from qexport.resilience.metrics import Metric
from qexport.rewrite import LeftAlone, Site
from qexport.rewrite.classical import to_classical
from qexport.rewrite.sample_attention import sample_attention
from qexport.validation.comparison import seeded_feed
from qexport.validation.probes import open_probe, watch
from qexport.validation.statistics import ErrorAccumulator
from qexport.validation.unpadded import keep_masks, padded_axis, rows


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
    """`values` of each cell; `classical` is the classical model's figure."""

    sites: list[Site]
    left_alone: list[LeftAlone]
    classical: float = 0.0
    values: list[Values] = field(default_factory=list)


@dataclass
class _Sums:
    """What one cell adds up over the batches."""

    total: np.ndarray
    output: ErrorAccumulator
    sites: list[ErrorAccumulator]


def noisy_model(bundle: Bundle, noise: str, shots, invert: bool):
    """The classical model with noisy attention: (proto, its sites, what is left alone, the names of the scale and the seed).

    The op library must be there: the fallback functions are not.

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
    inputs = [value.name for value in model.graph.inputs[-2:]]
    return ir.to_proto(model), sites, left_alone, inputs


def measure_cells(
    bundle: Bundle, inputs: Inputs, cells: list[Cell], metric: Metric, seeds: int, *, library, providers, say
) -> Found:
    """Run every cell on every input, `seeds` times where shots are drawn.

    Raises:
        QexportError: a model does not load or run.
    """
    groups: dict[tuple, list[int]] = {}
    for i, cell in enumerate(cells):
        groups.setdefault((cell.noise, cell.invert, *(run.shots for run in cell.runs)), []).append(i)
    found, values, done = None, {}, 0
    everything = sum(_count(cells[i], seeds) for i in range(len(cells))) * len(inputs.feeds)
    for (noise, invert, *shots), members in groups.items():
        with ExitStack() as stack:
            opened = {}
            for number in dict.fromkeys(shots):
                proto, sites, left_alone, names = noisy_model(bundle, noise, number, invert)
                _watch(proto, sites)
                probe = open_probe(proto, bundle.classical_path, library=library, providers=providers)
                opened[number] = stack.enter_context(probe)
            found = found or Found(sites, left_alone)
            places = [site.to_dict() for site in sites if site.output in {o.name for o in opened[shots[0]].get_outputs()}]
            watched = watch(bundle.classical_path, places)
            classical = stack.enter_context(open_probe(watched, bundle.classical_path, library=False, providers=providers))
            sums = {i: _new_sums(cells[i], seeds, len(places)) for i in members}
            total, count = 0.0, 0
            outputs = [metric.output, *(place["output"] for place in places)]
            for feed in inputs.feeds:
                base = runtime.run(classical, outputs, feed)
                symbols = {o.name: o.shape for o in classical.get_outputs()}
                kept = [
                    padded_axis(b.shape, symbols[o], keep_masks(bundle.manifest, feed))
                    for o, b in zip(outputs, base, strict=True)
                ]
                part, n = metric.add(bundle.manifest, feed, base[0], base[0])
                total, count = total + part, count + n
                for i in members:
                    cell = cells[i]
                    say(f"{cell.mitigation}, {cell.shots} shots, level {cell.level:g}", done / everything)
                    runs = [_run(cell, opened, names, outputs, feed, seed) for seed in _seeds(cell, seeds)]
                    for seed, run in enumerate(runs):
                        sums[i].total[seed] += metric.add(bundle.manifest, feed, base[0], run[0])[0]
                    for at, accumulator in enumerate([sums[i].output, *sums[i].sites]):
                        accumulator.add(rows(base[at], kept[at]), [rows(run[at], kept[at]) for run in runs])
                    done += _count(cell, seeds)
            found.classical = float(metric.mean(total, count))
            values |= {i: _values(sums[i], count, metric, found.classical, places) for i in members}
    found.values = [values[i] for i in range(len(cells))]
    return found


def _watch(proto: onnx.ModelProto, sites: list[Site]) -> None:
    """Make the outputs of sites of the main graph outputs of the model."""
    made = {name for node in proto.graph.node for name in node.output}
    present = {value.name for value in proto.graph.output}
    names = [site.output for site in sites if site.output in made - present]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)


def _seeds(cell: Cell, seeds: int) -> range:
    """Infinitely many shots draw nothing."""
    return range(1 if cell.shots == INFINITE else seeds)


def _count(cell: Cell, seeds: int) -> int:
    return len(cell.runs) * len(_seeds(cell, seeds))


def _new_sums(cell: Cell, seeds: int, sites: int) -> _Sums:
    count = len(_seeds(cell, seeds))
    return _Sums(np.zeros(count), ErrorAccumulator(count), [ErrorAccumulator(count) for _ in range(sites)])


def _run(cell: Cell, opened: dict, names: list[str], outputs: list[str], feed: dict, seed: int) -> list[np.ndarray]:
    """The outputs of one seed; every run of a cell draws by itself."""
    scale_input, seed_input = names
    total = None
    for number, run in enumerate(cell.runs):
        fed = seeded_feed(feed, seed_input, seed * len(cell.runs) + number)
        fed[scale_input] = np.array(run.scale, np.float32)
        found = runtime.run(opened[run.shots], outputs, fed)
        if len(cell.runs) == 1:
            return found
        weighted = [run.weight * value.astype(np.float64) for value in found]
        total = weighted if total is None else [a + b for a, b in zip(total, weighted, strict=True)]
    return total


def _values(sums: _Sums, count: int, metric: Metric, classical: float, places: list[dict]) -> Values:
    figures = metric.mean(sums.total, count)
    errors = np.array([one.relative_errors() for one in sums.sites])
    worst = int(errors.mean(axis=1).argmax())
    return Values(
        figures=figures,
        losses=metric.loss(figures, classical),
        output_errors=sums.output.relative_errors(),
        attention_errors=errors.mean(axis=0),
        worst_site={key: places[worst][key] for key in ("name", "layer", "module")}
        | {"relative_error": float(errors[worst].mean())},
    )
