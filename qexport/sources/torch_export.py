"""Export of torch modules to an ONNX graph with named axes and module names; every torch front end ends here."""

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qexport.errors import QexportError
from qexport.ops import DOMAIN
from qexport.progress import unwatched
from qexport.rewrite.convert_opset import convert_opset
from qexport.sources.modules import name_modules
from qexport.sources.quiet import quiet, reason_of
from qexport.sources.runnable import Runnable, as_exported, tensors
from qexport.sources.source import InputSpec, Source
from qexport.sources.specs import limits_of, name_axes, spec_of

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
    axes=None,
    output_names: list[str] | None = None,
    specs: dict[str, InputSpec] | None = None,
    say=unwatched,
) -> Source:
    """Export an nn.Module or ExportedProgram with torch.onnx.export and describe its inputs.

    Args:
        args, kwargs: example tensors.
        dynamic_shapes: as torch.export takes it, kept to the letter.
        axes: names of dynamic axes instead, {axis: name} per input; an axis that the model fixes stays fixed with a remark.
            With neither, batch axes and the axis 1 of token ids and of 3-D inputs are made dynamic.
        output_names: names of the graph outputs; None keeps the exporter's.
        specs: what is known of an input beyond its type and shape, by name.
        say: called with the step in words and the share that is done, 0 to 1.

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
            if axes is None:
                args, kwargs, axes = _guess_axes(args, kwargs)
            dynamic_shapes = torch.utils._pytree.tree_map_only(str, lambda name: torch.export.Dim.AUTO, axes)
    say("running the module", 0.0)
    try:
        with quiet(), torch.no_grad(), as_exported(torch):
            runner = module.module() if is_program else module
            expected = tensors(torch, runner(*args, **kwargs))
    except Exception as error:
        raise QexportError(f"{name}: the model does not run on its example inputs: {reason_of(error)}") from error
    say("exporting the module", 0.2)
    program = _to_onnx(torch, module, args, kwargs, dynamic_shapes, opset, output_names, name)
    if opset < 23 and any(node.domain == DOMAIN for node in program.model.graph.all_nodes()):
        raise QexportError(
            f"{name}: attention of qexport.nn needs opset 23 or newer, got {opset}; for an older one convert the model with "
            'classical attention (quantum_backend="classical", or before replace_attention)'
        )
    say("reading the export", 0.8)
    name_modules(program.model)
    notes = []
    if axes is not None:
        ranges = _ranges(program.exported_program)
        notes = _name_axes(program.model, list(axes.values() if isinstance(axes, Mapping) else axes), ranges)
    model = convert_opset(program.model, opset, name)
    for value, own in zip(model.graph.outputs, output_names or (), strict=False):  # the exporter names a twin by the other
        value.name = own
    leaves = tensors(torch, (args, kwargs))
    if len(leaves) != len(model.graph.inputs):
        raise QexportError(
            f"{name}: the graph has {len(model.graph.inputs)} inputs, the examples hold {len(leaves)} tensors"
        )
    name_axes(model)
    inputs = [_describe(value, specs or {}) for value in model.graph.inputs]
    limits = limits_of(model, inputs) | _axis_limits(torch, dynamic_shapes)
    if is_program and not any(isinstance(d, str) for spec in inputs for d in spec.shape):
        notes.append("the archive was exported with fixed shapes; its batch and sequence cannot vary")
    names = [tuple(value.name for value in values) for values in (model.graph.inputs, model.graph.outputs)]
    return Source(
        kind=kind,
        name=name,
        model=model,
        inputs=inputs,
        examples={value.name: to_numpy(leaf) for value, leaf in zip(model.graph.inputs, leaves, strict=True)},
        expected={v.name: to_numpy(t) for v, t in zip(model.graph.outputs, expected, strict=False)},
        limits={axis: size for axis, size in limits.items() if any(axis in spec.shape for spec in inputs)},
        notes=notes,
        runnable=None if is_program else Runnable(module, *names, (args, kwargs)),
    )


def _to_onnx(torch, module, args, kwargs, dynamic_shapes, opset: int, output_names, name: str):
    """The torch.onnx.ONNXProgram of a module or ExportedProgram, optimised.

    The exporter takes scaled_dot_product_attention with four axes and equal or grouped heads only; where it refuses, the op
    is written out in matrix products, from which the rules make Attention again.
    """
    import onnxscript.optimizer

    from qexport.nn.translation import translation_table
    from qexport.sources import missing_operators

    def export(model, args, kwargs, dynamic_shapes):
        return torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamo=True,
            opset_version=max(opset, EXPORTER_OPSET),
            dynamic_shapes=dynamic_shapes,
            output_names=output_names,
            custom_translation_table=translation_table() | missing_operators.translation_table(),
            verbose=False,
            optimize=False,
        )

    is_program = isinstance(module, torch.export.ExportedProgram)
    try:
        with quiet(), torch.no_grad():
            try:
                program = export(module, *(((), None, None) if is_program else (args, kwargs, dynamic_shapes)))
            except Exception as error:
                if "SDPA" not in reason_of(error) and "only 4D query" not in reason_of(error):
                    raise
                traced = module if is_program else torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes)
                table = {torch.ops.aten.scaled_dot_product_attention.default: _written_out}
                program = export(traced.run_decompositions(table), (), None, None)
            # the exporter's own optimisation also fuses RotaryEmbedding and others that few runtimes hold
            onnxscript.optimizer.optimize_ir(program.model)
    except Exception as error:
        raise QexportError(f"{name}: torch cannot export the model to ONNX: {reason_of(error)}") from error
    return program


def _written_out(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    """scaled_dot_product_attention as its documentation spells it, without dropout."""
    import torch

    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(repeats, -3) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        is_flag = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if is_flag else scores + attn_mask
    return torch.softmax(scores, -1) @ value


def to_numpy(tensor) -> np.ndarray:
    """A torch tensor as a numpy array; bfloat16 through ml_dtypes."""
    return ir.tensor(tensor.detach().cpu().contiguous()).numpy()


def _cast(tree, dtype):
    import torch

    return torch.utils._pytree.tree_map(lambda t: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t, tree)


def _guess_axes(args, kwargs):
    """Dynamic axes where the user gave none: axis 0 is the batch, axis 1 of an integer or 3-D float input the sequence.

    An axis of size 1 would be specialised to 1 by torch.export, so such a batch is doubled first.
    """
    tensors = [*args, *kwargs.values()]
    if all(t.ndim for t in tensors) and {t.shape[0] for t in tensors} == {1}:
        args = tuple(t.repeat(2, *[1] * (t.ndim - 1)) for t in args)
        kwargs = {k: t.repeat(2, *[1] * (t.ndim - 1)) for k, t in kwargs.items()}
    names = {}

    def axes(tensor):
        result = {0: "batch"} if tensor.ndim else {}
        token_like = tensor.ndim == 2 and not tensor.is_floating_point()
        if (token_like or (tensor.ndim == 3 and tensor.is_floating_point())) and tensor.shape[1] > 1:
            size = tensor.shape[1]
            result[1] = names.setdefault(size, "sequence" if not names else f"sequence_{len(names) + 1}")
        return result

    return args, kwargs, tuple(axes(t) for t in args) if args else {k: axes(t) for k, t in kwargs.items()}


def _ranges(program) -> dict[str, tuple[int, int]]:
    """(smallest, largest) size of each of the exporter's symbols; UNBOUNDED where there is no largest."""

    def number(bound):
        return int(bound) if getattr(bound, "is_Integer", False) else UNBOUNDED

    return {str(symbol): (number(r.lower), number(r.upper)) for symbol, r in program.range_constraints.items()}


def _name_axes(model: ir.Model, wanted: list[dict[int, str]], ranges: dict[str, tuple[int, int]]) -> list[str]:
    """Rename the exporter's symbols (s77) to the wanted axis names; remarks on axes that the model fixes."""
    renames, fixed = {}, {}
    for value, axes in zip(model.graph.inputs, wanted, strict=True):
        for axis, name in axes.items():
            found = value.shape[axis]
            least, most = (found, found) if isinstance(found, int) else ranges.get(str(found.value), (0, UNBOUNDED))
            if least == most:
                fixed.setdefault(name, least)
                if not isinstance(found, int):
                    renames[str(found.value)] = str(least)
            elif str(found.value).isidentifier():
                renames.setdefault(str(found.value), name)
    values = [*model.graph.inputs, *model.graph.outputs, *(v for n in model.graph.all_nodes() for v in n.outputs)]
    for value in values:
        if value.shape is not None:
            dims = [d if isinstance(d, int) or d.value is None else _renamed(str(d.value), renames) for d in value.shape]
            value.shape = ir.Shape([int(d) if isinstance(d, str) and d.isdigit() else d for d in dims])
    return [f"{name} is fixed at {size}: the model computes with that size" for name, size in fixed.items()]


def _renamed(expression: str, renames: dict[str, str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda match: renames.get(match[0], match[0]), expression)


def _describe(value: ir.Value, known: dict[str, InputSpec]) -> InputSpec:
    """The spec read off the graph, with the kind and bound that the front end knows."""
    spec = spec_of(value)
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
