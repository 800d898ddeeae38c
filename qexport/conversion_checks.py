"""Checks of a conversion on the example inputs: source, classical model and fallback must agree up to rounding."""

from pathlib import Path

import numpy as np

from qexport.errors import QexportError
from qexport.sources.source import Source


def run_classical(source: Source, path: Path):
    """(outputs by name, deviation from the source); (None, None) where this onnxruntime has no kernels for bfloat16.

    Raises:
        QexportError: it does not run, or differs from the source by more than rounding.
    """
    try:
        runner = Runner(path)
        if source.cache is not None:
            source.cache.fill(source.examples, runner)
        outputs = runner(source.examples)
    except QexportError as error:
        if "bfloat16" not in _types(source):
            raise
        source.notes.append(f"not checked, since this onnxruntime cannot run bfloat16 on the CPU: {error}")
        return None, None
    for name, array in outputs.items():
        if array.dtype.kind == "f" and array.size and np.isnan(array).all():
            raise QexportError(f"{source.name}: output {name!r} is NaN throughout on the example inputs; check the weights")
    if source.expected is None:
        return outputs, None
    difference = difference_of(source.expected, outputs)
    allowed = allowed_difference(source)
    if not difference <= allowed:
        raise QexportError(
            f"{source.name}: the classical ONNX model differs from the source by {difference:.2g} of the largest output "
            f"({allowed:.0e} is allowed); please report the model"
        )
    return outputs, difference


def check_fallback(source: Source, path: Path, outputs: dict) -> None:
    """Check that the converted model without the op library computes what the classical one does.

    Raises:
        QexportError: it does not.
    """
    difference = difference_of(outputs, Runner(path)(source.examples))
    if not difference <= allowed_difference(source):
        raise QexportError(
            f"{source.name}: the converted model without the op library differs from the classical one by {difference:.2g} "
            "of the largest output; if its masks leave every query a key to see on any input, please report the model"
        )


def check_library(source: Source, path: Path, outputs: dict) -> None:
    """Check that the converted model runs with the op library, where this installation has it.

    How far it is from the classical model is the recipe's affair, and for `qexport validate` to say.

    Raises:
        QexportError: it does not load or run, or an output is of another shape or NaN where the classical one is not.
    """
    from qexport.installed import find_library

    library = find_library()
    if library is None:
        return
    found = Runner(path, library=str(library))(source.examples)
    for name, array in ((name, found[name]) for name in outputs):
        if array.shape != outputs[name].shape:
            raise QexportError(
                f"{source.name}: output {name!r} has shape {array.shape} with the op library; please report it"
            )
        if array.dtype.kind == "f" and (np.isnan(array) & ~np.isnan(outputs[name])).any():
            raise QexportError(f"{source.name}: output {name!r} holds NaN with the op library; please report the model")


def allowed_difference(source: Source) -> float:
    """The largest relative difference that rounding explains: by type, and wide where activations are quantised."""
    if any(node.op_type in ("DynamicQuantizeLinear", "QuantizeLinear") for node in source.model.graph.all_nodes()):
        note = "activations are quantised as the model runs: the last digit of one value can move a whole quantisation step"
        if note not in source.notes:
            source.notes.append(note)
        return 0.5
    types = _types(source)
    return 5e-2 if "bfloat16" in types else 2e-2 if "float16" in types else 1e-3


def _types(source: Source) -> set[str]:
    """Names of the element types of the inputs, the weights and what is computed from them."""
    values = [*source.model.graph.initializers.values(), *(x for n in source.model.graph.all_nodes() for x in n.outputs)]
    known = {value.dtype for value in values} - {None}
    return {spec.dtype for spec in source.inputs} | {dtype.name.lower() for dtype in known}


class Runner:
    """An open session of a model on the CPU provider, without the op library unless named: feeds in, outputs by name out.

    Raises:
        QexportError: onnxruntime cannot load or run it.
    """

    def __init__(self, path: Path, library: str | bool = False):
        from qexport.installed import onnxruntime
        from qexport.runtime import session

        options = onnxruntime().SessionOptions()
        options.log_severity_level = 4  # the error that is raised says it all
        self.name = path.name
        try:
            self.session = session(path, library=library, options=options)
        except QexportError as error:  # name the file as the bundle does, not its temporary folder
            raise QexportError(str(error).replace(str(path), path.name)) from error

    def __call__(self, feeds: dict) -> dict[str, np.ndarray]:
        from qexport.failures import one_line

        names = [output.name for output in self.session.get_outputs()]
        try:
            return dict(zip(names, self.session.run(names, feeds), strict=True))
        except Exception as error:
            raise QexportError(f"{self.name}: onnxruntime cannot run the model: {one_line(error)}") from error


def difference_of(expected: dict, outputs: dict) -> float:
    """Largest |a - b| over all outputs that both have, relative to the largest finite |a| of that output."""
    worst = 0.0
    for name in expected.keys() & outputs.keys():
        a, b = (np.asarray(x, np.float64) for x in (expected[name], outputs[name]))
        if a.shape != b.shape:
            return float("inf")
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        finite = np.abs(a[np.isfinite(a)])
        span = max(finite.max(initial=0.0), 1e-30)
        with np.errstate(invalid="ignore"):  # infinities that are the same
            apart = np.where(same, 0.0, np.abs(a - b))
        worst = max(worst, float(np.max(apart / span, initial=0.0)))
    return worst
