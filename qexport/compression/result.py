"""What a compression made, in figures of the file that was written."""

from dataclasses import dataclass, field

import numpy as np

from qexport.compression import nodes
from qexport.compression.forms import Form, Method
from qexport.compression.layers import Layer
from qexport.compression.products import Rounded, names_of
from qexport.compression.search import Search
from qexport.compression.trials import Measured
from qexport.recipe_compression import INT8_PRODUCTS


@dataclass
class Result:
    """What a job made: figures of the file that was written, on the judging data, and how it came about."""

    size: dict
    measured: Measured
    outputs: dict
    layers: list[dict]
    trials: list[dict]
    oldest_runtime: tuple[int, ...]
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def result_of(job, search: Search, written, reasons: list[str]) -> Result:
    """The result of a `qexport.compression.job.Job` whose search ended in a file.

    Args:
        written: the `qexport.compression.job.Written`.
        reasons: why what was asked for is not reached; none where it is.
    """
    measured, notes, reasons = written.measured, list(written.notes), list(reasons)
    if not np.isfinite(measured.loss):
        reasons.append(f"{job.metric.name} of the file is {measured.figure} on this data; ask for less")
    if search.unseen:
        notes.append(
            f"{len(search.unseen)} of {len(job.layers)} weights saw too few inputs for low-rank factors: give more data"
        )
    if job.settings.products == INT8_PRODUCTS:
        notes.append(_about_products(job.layers, job.rounded))
    forms, whole = written.forms, names_of(job.rounded)
    oldest = [nodes.oldest_runtime(x, forms[x.name], as_matrix=x.name in whole) for x in job.layers if x.name in forms]
    return Result(
        size={"before": job.before, "after": written.nbytes, "ratio": job.before / written.nbytes},
        measured=measured,
        outputs={name: {"relative_error": error} for name, error in written.outputs.items()},
        layers=[
            _layer_entry(search, layer, method, forms.get(layer.name), job.rounded)
            for layer, method in zip(job.layers, written.candidate.methods, strict=True)
        ],
        trials=[
            {"bytes": tried.nbytes, "loss": tried.measured.loss, "error": tried.measured.error}
            for tried in search.candidates
        ],
        oldest_runtime=max(oldest, default=()),
        reasons=reasons,
        notes=notes,
    )


def _about_products(layers: list[Layer], rounded: tuple[Rounded, ...]) -> str:
    found, products = len(names_of(rounded)), sum(bool(layer.products) for layer in layers)
    left = "" if found == products else "; the others would gain too little, lose too much or are not of float32"
    return f"products of {found} of {products} weights are of whole numbers{left}"


def _layer_entry(search: Search, layer: Layer, method: Method, form: Form | None, rounded: tuple[Rounded, ...]) -> dict:
    seen, error = search.seen(layer), 0.0
    groups = [group for group in rounded if layer.name in group.layers]
    if groups:
        error = seen.error_of(groups[0].matrix(form.dense() if form else seen.matrix)) ** 0.5
    elif form:
        error = seen.error(form) ** 0.5
    return {
        "name": layer.name,
        "module": layer.label,
        "kinds": list(layer.kinds),
        "shape": list(layer.shape),
        "method": str(method),
        "int8_products": bool(groups),
        "before": layer.nbytes,
        "after": form.nbytes if form else layer.nbytes,
        "relative_error": error,
    }
