"""Torch front ends: `package.module:callable` and .pt2 archives."""

import contextlib
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from qexport.errors import QexportError, UsageError
from qexport.progress import portion
from qexport.sources.quiet import quiet, reason_of
from qexport.sources.source import Source
from qexport.sources.torch_export import export_module, import_torch


def open_callable(text: str, *, opset: int, dtype: str | None, say) -> Source:
    """Export what `package.module:callable` returns: (nn.Module, example inputs[, dynamic_shapes]).

    Example inputs are a tuple (positional) or a dict (keywords) of tensors; dynamic_shapes as torch.export takes them.

    Raises:
        UsageError: the module or callable is not there, or returns something else.
        QexportError: the callable itself fails, or torch cannot export the module.
    """
    torch = import_torch()
    module_name, _, attribute = text.partition(":")
    function = _find_callable(text, module_name, attribute)
    try:
        with quiet():
            result = function()
    except Exception as error:
        raise QexportError(f"{text}: the callable failed: {reason_of(error)}") from error
    wanted = "it must return (nn.Module, example inputs), the inputs a tuple or dict of tensors"
    if not isinstance(result, tuple) or len(result) not in (2, 3) or not isinstance(result[0], torch.nn.Module):
        got = (
            f"({', '.join(type(part).__name__ for part in result)})" if isinstance(result, tuple) else type(result).__name__
        )
        raise UsageError(f"{text}: {wanted}, got {got}")
    module, inputs = result[:2]
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, (tuple, list, Mapping)) or not inputs:
        raise UsageError(f"{text}: {wanted}, got inputs of type {type(inputs).__name__}")
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    if strange := [type(v).__name__ for v in values if not isinstance(v, torch.Tensor)]:
        raise UsageError(f"{text}: {wanted}, got an input of type {strange[0]}")
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    shapes = result[2] if len(result) == 3 else None
    say = portion(say, 0.5, 1.0)
    return export_module(
        module, args, kwargs, kind="callable", name=text, opset=opset, dtype=dtype, dynamic_shapes=shapes, say=say
    )


def _find_callable(text: str, module_name: str, attribute: str):
    if not module_name or not attribute:
        raise UsageError(f"{text}: not of the form package.module:callable")
    added = os.getcwd() not in sys.path
    if added:  # a callable beside the user, as `python -m` finds it
        sys.path.insert(0, os.getcwd())
    try:
        with quiet():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UsageError(f"{text}: no module named {error.name!r}; install it or run from its folder") from error
        raise QexportError(f"{text}: importing {module_name} failed: {reason_of(error)}") from error
    except Exception as error:
        raise QexportError(f"{text}: importing {module_name} failed: {reason_of(error)}") from error
    finally:
        if added:
            with contextlib.suppress(ValueError):
                sys.path.remove(os.getcwd())
    found = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise UsageError(f"{text}: module {module_name} has no {attribute!r}")
    if not callable(found):
        raise UsageError(f"{text}: {attribute!r} is a {type(found).__name__}, not a callable")
    return found


def open_archive(path: Path, *, opset: int, dtype: str | None, say) -> Source:
    """Export a .pt2 archive of torch.export.save; its dynamic axes are those it was exported with.

    Raises:
        QexportError: no such archive, or torch cannot export it.
    """
    if dtype is not None:
        raise UsageError(f"{path}: dtype is for modules; a .pt2 archive keeps its own type")
    torch = import_torch()
    try:
        with quiet():
            import qexport.nn  # noqa: F401  (the operators that an archive may hold)

            program = torch.export.load(path)
    except Exception as error:
        raise QexportError(f"{path}: not a .pt2 archive of torch.export.save, or cut short: {reason_of(error)}") from error
    args, kwargs = program.example_inputs or ((), {})
    if not args and not kwargs:
        raise QexportError(f"{path}: the archive holds no example inputs; save it with torch.export.save again")
    return export_module(
        program, args, kwargs, kind="pt2", name=path.name, opset=opset, dtype=None, say=portion(say, 0.5, 1.0)
    )
