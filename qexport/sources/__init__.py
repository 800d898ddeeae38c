"""Front ends: whatever the user names becomes an ONNX graph with input specs, example inputs and module names."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qexport.errors import QexportError, UsageError
from qexport.progress import unwatched

DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class InputSpec:
    """One graph input as the manifest describes it.

    `shape` holds sizes and names of dynamic axes; `kind` is one of token_ids, mask, token_types, position_ids,
    continuous, boolean, integer, and of a KV cache past_length and cache; `high` is the exclusive upper bound of integers,
    None when unknown.
    """

    name: str
    dtype: str
    shape: list
    kind: str
    high: int | None = None

    def to_dict(self) -> dict:
        """The entry of manifest["inputs"]."""
        return {"name": self.name, "dtype": self.dtype, "shape": self.shape, "kind": self.kind, "high": self.high}


@dataclass
class Source:
    """A model as its front end delivers it.

    `model` is the graph, not yet classical; `examples` maps input names to arrays and `expected` output names to what
    the source itself computes for them (None: it could not be run). `limits` gives the largest size of dynamic axes,
    `tokenizer` the text of a tokenizer.json, `stop_tokens` the ids that end a text. `cache` is a
    `qexport.kv_cache.KVCache` once the model has one. `notes` are remarks for the report. `runnable` is a
    `qexport.sources.runnable.Runnable` where the model comes from a torch module.
    """

    kind: str
    name: str
    model: ir.Model
    inputs: list[InputSpec]
    examples: dict[str, np.ndarray]
    expected: dict[str, np.ndarray] | None = None
    limits: dict[str, int] = field(default_factory=dict)
    tokenizer: str | None = None
    stop_tokens: list[int] = field(default_factory=list)
    cache: object = None
    notes: list[str] = field(default_factory=list)
    runnable: object = None


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
        UsageError: the name is none of the four, or an option does not fit the kind.
        QexportError: the source cannot be read or exported.
    """
    say("reading the model", 0.0)
    text = str(model)
    path = Path(text)
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
        raise UsageError(f"{text}: unknown kind of file; give an .onnx or .pt2 file, a folder or package.module:callable")
    if ":" in text and "/" not in text:
        from qexport.sources.torch_module import open_callable

        return open_callable(text, opset=opset, dtype=dtype, say=say)
    shown = text if len(text) <= 200 else f"{text[:200]}…"
    raise QexportError(f"{shown}: no such file or folder, and not of the form package.module:callable")
