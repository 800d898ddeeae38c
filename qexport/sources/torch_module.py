"""Torch front ends: `package.module:callable`, .pt2 archives, and the export that the Hugging Face front end uses too."""

import contextlib
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qexport.errors import QexportError, UsageError
from qexport.rewrite.convert_opset import convert_opset
from qexport.sources import InputSpec, Source
from qexport.sources.quiet import quiet, reason_of
from qexport.sources.specs import limits_of, spec_of

# The exporter's own lowest opset; below it the finished graph is converted down.
EXPORTER_OPSET = 18
# torch.export.Dim without a maximum carries one near 2^63.
UNBOUNDED = 2**31


def import_torch():
    """torch, or one line that says how to install it."""
    try:
        with quiet():
            import torch
    except ImportError as error:
        raise QexportError(f'torch cannot be imported ({reason_of(error)}): pip install "qexport[export]"') from error
    return torch


def open_callable(text: str, *, opset: int, dtype: str | None) -> Source:
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
    return export_module(module, args, kwargs, kind="callable", name=text, opset=opset, dtype=dtype, dynamic_shapes=shapes)


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


def open_archive(path: Path, *, opset: int, dtype: str | None) -> Source:
    """Export a .pt2 archive of torch.export.save; its dynamic axes are those it was exported with.

    Raises:
        QexportError: no such archive, or torch cannot export it.
    """
    if dtype is not None:
        raise UsageError(f"{path}: dtype is for modules; a .pt2 archive keeps its own type")
    torch = import_torch()
    try:
        with quiet():
            program = torch.export.load(path)
    except Exception as error:
        raise QexportError(f"{path}: not a .pt2 archive of torch.export.save, or cut short: {reason_of(error)}") from error
    args, kwargs = program.example_inputs or ((), {})
    if not args and not kwargs:
        raise QexportError(f"{path}: the archive holds no example inputs; save it with torch.export.save again")
    return export_module(program, args, kwargs, kind="pt2", name=path.name, opset=opset, dtype=None)


def export_module(
    module,
    args: tuple,
    kwargs: dict,
    *,
    kind: str,
    name: str,
    opset: int,
    dtype: str | None = None,
    dynamic_shapes=None,
    output_names: list[str] | None = None,
    specs: dict[str, InputSpec] | None = None,
) -> Source:
    """Export an nn.Module or ExportedProgram with torch.onnx.export and describe its inputs.

    Args:
        args, kwargs: example tensors.
        dynamic_shapes: as torch.export takes it; None makes batch axes and the token axes of 2-D integer inputs dynamic.
        output_names: names of the graph outputs; None keeps the exporter's.
        specs: what is known of an input beyond its type and shape, by name.

    Raises:
        QexportError: the module does not run on the examples, or cannot be exported.
    """
    torch = import_torch()
    is_program = isinstance(module, torch.export.ExportedProgram)
    if not is_program:
        module = module.eval()
        if dtype is not None:
            module = module.to(getattr(torch, dtype))
            args, kwargs = _cast((args, kwargs), getattr(torch, dtype))
        if dynamic_shapes is None:
            args, kwargs, dynamic_shapes = _guess_axes(torch, args, kwargs)
        elif isinstance(dynamic_shapes, Mapping) and args and not kwargs:
            dynamic_shapes = tuple(dynamic_shapes.values())
    try:
        with quiet(), torch.no_grad():
            runner = module.module() if is_program else module
            expected = [leaf for leaf in torch.utils._pytree.tree_leaves(runner(*args, **kwargs)) if torch.is_tensor(leaf)]
    except Exception as error:
        raise QexportError(f"{name}: the model does not run on its example inputs: {reason_of(error)}") from error
    try:
        with quiet(), torch.no_grad():
            import onnxscript.optimizer

            program = torch.onnx.export(
                module,
                () if is_program else args,
                kwargs=None if is_program else kwargs,
                dynamo=True,
                opset_version=max(opset, EXPORTER_OPSET),
                dynamic_shapes=None if is_program else dynamic_shapes,
                output_names=output_names,
                verbose=False,
                optimize=False,
            )
            # the exporter's own optimisation also fuses RotaryEmbedding and others that few runtimes hold
            onnxscript.optimizer.optimize_ir(program.model)
    except Exception as error:
        raise QexportError(f"{name}: torch cannot export the model to ONNX: {reason_of(error)}") from error
    name_modules(program.model)
    model = convert_opset(program.model, opset, name)
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
    if len(leaves) != len(model.graph.inputs):
        raise QexportError(
            f"{name}: the graph has {len(model.graph.inputs)} inputs, the examples hold {len(leaves)} tensors"
        )
    inputs = [_describe(value, model, specs or {}) for value in model.graph.inputs]
    limits = limits_of(model, inputs) | _axis_limits(torch, dynamic_shapes)
    if is_program and not any(isinstance(d, str) for spec in inputs for d in spec.shape):
        note = ["the archive was exported with fixed shapes; its batch and sequence cannot vary"]
    else:
        note = []
    return Source(
        kind=kind,
        name=name,
        model=model,
        inputs=inputs,
        examples={value.name: to_numpy(leaf) for value, leaf in zip(model.graph.inputs, leaves, strict=True)},
        expected={v.name: to_numpy(t) for v, t in zip(model.graph.outputs, expected, strict=False)},
        limits={axis: size for axis, size in limits.items() if any(axis in spec.shape for spec in inputs)},
        notes=note,
    )


def to_numpy(tensor) -> np.ndarray:
    """A torch tensor as a numpy array; bfloat16 through ml_dtypes."""
    return ir.tensor(tensor.detach().cpu().contiguous()).numpy()


def name_modules(model: ir.Model) -> None:
    """Replace the exporter's metadata (which holds paths of this machine) by `qexport.module`, the torch module name."""
    import ast

    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        node.doc_string = None
        if scopes:
            path = ast.literal_eval(scopes)
            if len(path) > 1 and path[-2]:
                node.metadata_props["qexport.module"] = path[-2]
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _cast(tree, dtype):
    import torch

    return torch.utils._pytree.tree_map(lambda t: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t, tree)


def _guess_axes(torch, args, kwargs):
    """Dynamic axes where the user gave none: axis 0 is the batch, axis 1 of an integer or 3-D float input the sequence.

    An axis of size 1 would be specialised to 1 by torch.export, so such a batch is doubled first.
    """
    tensors = [*args, *kwargs.values()]
    if all(t.ndim for t in tensors) and {t.shape[0] for t in tensors} == {1}:
        args = tuple(t.repeat(2, *[1] * (t.ndim - 1)) for t in args)
        kwargs = {k: t.repeat(2, *[1] * (t.ndim - 1)) for k, t in kwargs.items()}
    names = {}

    def axes(tensor):
        if tensor.ndim == 0:
            return {}
        result = {0: "batch"}
        sequence_like = (tensor.ndim == 2 and not tensor.is_floating_point()) or (
            tensor.ndim == 3 and tensor.is_floating_point()
        )
        if sequence_like and tensor.shape[1] > 1:
            size = tensor.shape[1]
            result[1] = names.setdefault(size, "sequence" if not names else f"sequence_{len(names) + 1}")
        return result

    shapes = tuple(axes(t) for t in args) if args else {k: axes(t) for k, t in kwargs.items()}
    return args, kwargs, shapes


def _describe(value: ir.Value, model: ir.Model, known: dict[str, InputSpec]) -> InputSpec:
    """The spec read off the graph, with the kind and bound that the front end knows."""
    spec = spec_of(value, model)
    if (told := known.get(value.name)) is not None:
        spec.kind, spec.high = told.kind, told.high
    return spec


def _axis_limits(torch, shapes) -> dict[str, int]:
    """The upper bounds that torch.export.Dim objects among dynamic shapes carry."""
    limits = {}
    for dim in torch.utils._pytree.tree_leaves(shapes, is_leaf=lambda x: hasattr(x, "max") and hasattr(x, "min")):
        largest = getattr(dim, "max", None)
        if isinstance(largest, int) and largest < UNBOUNDED:
            limits[getattr(dim, "__name__", "")] = largest
    return limits
