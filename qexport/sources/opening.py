"""Finds the front end for what the user names."""

import os
import re

from qexport.arguments import as_path
from qexport.errors import QexportError, UsageError
from qexport.progress import unwatched
from qexport.sources.source import Source

DTYPES = ("float32", "float16", "bfloat16")


def open_source(
    model, *, opset: int = 23, dtype: str | None = None, task: str | None = None, positions: bool = False, say=unwatched
) -> Source:
    """Read `model`: a Hugging Face folder, `package.module:callable`, a .pt2 or an .onnx file.

    Args:
        model: path or callable name.
        opset: opset that torch front ends export at.
        dtype: float32, float16 or bfloat16: the type a torch front end exports in; None keeps it.
        task: task of a Hugging Face model.
        positions: give a Hugging Face language model position ids as an input in place of the attention mask, as a KV
            cache needs it.
        say: called with the step in words and the share that is done, 0 to 1.

    Raises:
        UsageError: `model` is no name, or an option does not fit the kind.
        QexportError: the source is none of the four kinds, or cannot be read or exported.
    """
    say("reading the model", 0.0)
    source = _front_end(model, opset, dtype, task, positions, say)
    source.task, source.dtype = task, dtype
    return source


def _front_end(model, opset: int, dtype: str | None, task: str | None, positions: bool, say) -> Source:
    if not isinstance(model, str | os.PathLike):
        raise UsageError(
            f"model must be a path or the name of a callable, got {type(model).__name__}; for a torch module write a "
            "function that returns (module, inputs) and give 'package.module:function'"
        )
    text = str(model)
    path = as_path("model", model)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    # os.path, not Path: a name that is no path at all is no error there
    is_folder, is_file, suffix = os.path.isdir(text), os.path.isfile(text), path.suffix.lower()
    if task is not None and not is_folder:
        raise UsageError(f"task {task!r} is for Hugging Face folders only, {text} is none")
    if is_folder:
        from qexport.sources.huggingface import open_folder

        return open_folder(path, opset=opset, dtype=dtype, task=task, positions=positions, say=say)
    if suffix in (".onnx", ".pt2"):
        if not is_file:
            raise QexportError(f"{text}: no such file")
        if suffix == ".pt2":
            from qexport.sources.torch_module import open_archive

            return open_archive(path, opset=opset, dtype=dtype, say=say)
        if dtype is not None:
            raise UsageError(f"{text}: dtype is for torch models; an .onnx file keeps its own type")
        from qexport.sources.onnx_file import open_file

        return open_file(path, opset=opset)
    if is_file:
        raise QexportError(f"{text}: unknown kind of file; give an .onnx or .pt2 file, a folder or package.module:callable")
    if ":" in text and "/" not in text:
        from qexport.sources.torch_module import open_callable

        return open_callable(text, opset=opset, dtype=dtype, say=say)
    shown = text if len(text) <= 200 else f"{text[:200]}…"
    mend = ""
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):  # as models of the Hugging Face hub are called
        mend = f"; nothing is downloaded: for a model of the Hugging Face hub, 'hf download {text} --local-dir FOLDER' first"
    raise QexportError(f"{shown}: no such file or folder, and not of the form package.module:callable{mend}")
