"""What is compressed: a bundle that is there, or one made of a model whose attention may stay classical."""

import shutil
from contextlib import contextmanager
from pathlib import Path

from onnx_ir.passes import common as passes

from qexport.arguments import whole
from qexport.bundle import MANIFEST, Bundle
from qexport.compression.layers import SMALLEST
from qexport.conversion import OPSETS, write_models
from qexport.errors import QexportError, UsageError
from qexport.manifest import OPSET
from qexport.progress import portion
from qexport.recipe import Recipe


def open_model(
    model, folder: Path, sampling: Recipe | None, opset: int | None, task: str | None, say
) -> tuple[Bundle, object, list[str]]:
    """Put a bundle into `folder`: (the bundle, its `qexport.sources.source.Source` where it was made here, remarks).

    Args:
        model: a folder with a bundle, or what `qexport.convert` takes.
        sampling: how attention is sampled; None leaves it classical, or as the bundle has it.
        say: called with the step in words and the share that is done.

    Raises:
        UsageError: a recipe for the attention of a bundle, or an opset or a task of one.
        QexportError: the model cannot be read, or is compressed already.
    """
    if isinstance(model, Bundle) or (Path(str(model)) / MANIFEST).is_file():
        bundle = model if isinstance(model, Bundle) else Bundle.open(model)
        for name, value in (("a recipe for attention", sampling), ("opset", opset), ("task", task)):
            if value is not None:
                raise UsageError(
                    f"{bundle.path} is a bundle, which {name} no longer changes; compress the model it came from"
                )
        if "compression" in bundle.manifest:
            raise QexportError(f"{bundle.path}: is compressed already; compress the bundle or model it came from")
        say("copying the bundle", 0.0)
        return _copied(bundle, folder), None, []
    from qexport.sources.opening import open_source

    opset = OPSET if opset is None else opset
    if not OPSETS[0] <= whole("opset", opset) <= OPSETS[1]:
        raise UsageError(f"opset must be between {OPSETS[0]} and {OPSETS[1]}, got {opset}")
    source = open_source(model, opset=opset, task=task, say=portion(say, 0.0, 0.5))
    passes.LiftConstantsToInitializersPass(size_limit=SMALLEST)(source.model)  # where weights are looked for
    report = write_models(folder, source, sampling, opset, None, portion(say, 0.5, 1.0))
    return Bundle(folder, report.manifest), source, report.notes


def _copied(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle's own files in `folder`, and nothing else that lies among them."""
    for name in bundle.file_names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, folder / name)
    return Bundle(folder, dict(bundle.manifest))


@contextmanager
def named_as(model, folder: Path):
    """What goes wrong in `folder`, where a bundle is in the making, is told of the model that it is made from."""
    try:
        yield
    except QexportError as error:
        shown = model.path if isinstance(model, Bundle) else model
        raise type(error)(str(error).replace(str(folder), str(shown))) from error
