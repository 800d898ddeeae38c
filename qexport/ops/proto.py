"""From the op table to ONNX protos: nodes, schemas and the classical fallback functions."""

from collections.abc import Sequence
from importlib import import_module

import onnx
from onnx import defs, helper

from qexport.errors import UsageError
from qexport.ops import DOMAIN, OPS, VERSION, Attr, OpSpec

_ATTR_TYPES = {
    "int": defs.OpSchema.AttrType.INT,
    "ints": defs.OpSchema.AttrType.INTS,
    "float": defs.OpSchema.AttrType.FLOAT,
    "string": defs.OpSchema.AttrType.STRING,
}


def spec_of(op_name: str) -> OpSpec:
    """The table entry of an op.

    Raises:
        UsageError: the table has no such op; the message lists the known ones.
    """
    for spec in OPS:
        if spec.name == op_name:
            return spec
    raise UsageError(f"no op named {op_name!r} in {DOMAIN}; known: {', '.join(spec.name for spec in OPS)}")


def check_attribute(op_name: str, attr: Attr, value: object) -> object:
    """`value` in the form that the node stores, or an error that names the value and the limit."""
    where = f"[{op_name}] {attr.name}"
    try:
        if attr.kind == "ints":
            value = [int(v) for v in (value if isinstance(value, Sequence) else [value])]
        else:
            value = {"int": int, "float": float, "string": str}[attr.kind](value)
    except (TypeError, ValueError):
        raise UsageError(f"{where} must be of kind {attr.kind}, got {value!r}") from None
    for v in value if attr.kind == "ints" else [value]:
        if attr.choices and v not in attr.choices:
            raise UsageError(f"{where} must be one of {', '.join(map(str, attr.choices))}, got {v!r}")
        if attr.minimum is not None and not v >= attr.minimum:
            raise UsageError(f"{where} must be >= {attr.minimum}, got {v}")
    if attr.kind == "ints" and not value:
        raise UsageError(f"{where} must hold at least one number, got an empty list")
    return value


def make_node(op_name: str, inputs: Sequence[str], outputs: Sequence[str], name: str = "", **attributes) -> onnx.NodeProto:
    """A node of the domain com.qexport with every default of the table written out.

    Args:
        inputs, outputs: value names in the order of the table; "" leaves an optional one out.
        attributes: as in the table; None leaves an optional one out.

    Raises:
        UsageError: an unknown op or attribute, a value outside its limits, too few or too many inputs or outputs.
    """
    spec = spec_of(op_name)
    for what, given, params in (("input", inputs, spec.inputs), ("output", outputs, spec.outputs)):
        least = sum(not p.optional for p in params)
        if not least <= len(given) <= len(params):
            raise UsageError(f"[{op_name}] takes {least} to {len(params)} {what}s, got {len(given)}")
    known = [attr.name for attr in spec.attributes]
    for key in attributes:
        if key not in known:
            raise UsageError(f"[{op_name}] has no attribute {key!r}; known: {', '.join(known)}")
    values = {}
    for attr in spec.attributes:
        value = attributes.get(attr.name)
        value = attr.default if value is None else value
        if value is not None:
            values[attr.name] = check_attribute(op_name, attr, value)
    trimmed_in, trimmed_out = (_without_trailing_blanks(names) for names in (inputs, outputs))
    return helper.make_node(op_name, trimmed_in, trimmed_out, name=name, domain=DOMAIN, **values)


def _without_trailing_blanks(names: Sequence[str]) -> list[str]:
    names = list(names)
    while names and not names[-1]:
        names.pop()
    return names


def function_proto(op_name: str, opset: int = 23, num_outputs: int = 1) -> onnx.FunctionProto:
    """The classical fallback of an op as a model-local function of the same domain and name.

    An onnxruntime without the op library runs this body in place of the kernel.

    Args:
        opset: version of the ai.onnx domain of the model that will hold the function.
        num_outputs: how many outputs of the op the function has. onnxruntime wants exactly as many on each node that
            calls it: pad shorter nodes with "".

    Raises:
        UsageError: the op has no fallback at that opset.
    """
    spec = spec_of(op_name)
    nodes = import_module(f"qexport.ops.{spec.stem}").fallback_nodes(opset, num_outputs)
    return helper.make_function(
        DOMAIN,
        spec.name,
        [param.name for param in spec.inputs],
        [param.name for param in spec.outputs[:num_outputs]],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=[attr.name for attr in spec.attributes],
        doc_string=f"Fallback: {spec.fallback}",
    )


def register_schemas() -> None:
    """Register the schema of every op with onnx, so that its checker and shape inference know the domain."""
    for spec in OPS:
        if not defs.has(spec.name, VERSION, DOMAIN):
            onnx.defs.register_schema(_schema(spec))


def _schema(spec: OpSpec) -> defs.OpSchema:
    def formal(param):
        option = defs.OpSchema.FormalParameterOption
        return defs.OpSchema.FormalParameter(
            param.name, param.type_var, param.doc, param_option=option.Optional if param.optional else option.Single
        )

    def attribute(attr):
        if attr.default is None:
            return defs.OpSchema.Attribute(attr.name, _ATTR_TYPES[attr.kind], attr.doc, required=False)
        return defs.OpSchema.Attribute(attr.name, helper.make_attribute(attr.name, attr.default), attr.doc)

    schema = defs.OpSchema(
        spec.name,
        DOMAIN,
        VERSION,
        doc=spec.summary,
        inputs=[formal(p) for p in spec.inputs],
        outputs=[formal(p) for p in spec.outputs],
        type_constraints=[(var, list(types), "") for var, types in spec.type_vars.items()],
        attributes=[attribute(a) for a in spec.attributes],
    )
    infer = getattr(import_module(f"qexport.ops.{spec.stem}"), "infer_shapes", None)
    if infer is not None:
        schema.set_type_and_shape_inference_function(infer)
    return schema
