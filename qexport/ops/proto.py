"""From the op table to ONNX protos: nodes, schemas and the classical fallback functions."""

from collections.abc import Sequence
from importlib import import_module

import onnx
from onnx import defs, helper

from qexport.arguments import whole
from qexport.errors import UsageError
from qexport.ops import DOMAIN, OPS, VERSION, OpSpec

# Metadata of a node: what it computes where the op library is not there.
FALLBACK_KEY = "qexport.fallback"
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


def make_node(op_name: str, inputs: Sequence[str], outputs: Sequence[str], name: str = "", **attributes) -> onnx.NodeProto:
    """A node of the domain com.qexport with every default of the op table (docs/ops.md) written out, and with what it falls
    back to without the op library, if anything, as metadata `qexport.fallback`.

    Args:
        op_name: of the table, as `QuantumAttention`.
        inputs, outputs: value names in the order of the table; "" leaves an optional one out.
        name: of the node.
        attributes: as in the table; None leaves an optional one out.

    Raises:
        UsageError: an unknown op or attribute, a value outside its limits, too few or too many inputs or outputs.
    """
    spec = spec_of(op_name)
    for what, given, params in (("input", inputs, spec.inputs), ("output", outputs, spec.outputs)):
        least = sum(not p.optional for p in params)
        if not least <= len(given) <= len(params):
            raise UsageError(f"[{op_name}] takes {least} to {len(params)} {what}s, got {len(given)}")
    values = {name: value for name, value in spec.resolve(attributes).items() if value is not None}
    inputs = list(inputs)
    while inputs and not inputs[-1]:  # onnxruntime before 1.24 crashes on "" inputs where it infers shapes
        inputs.pop()
    node = helper.make_node(op_name, inputs, outputs, name=name, domain=DOMAIN, **values)
    if spec.fallback:
        node.metadata_props.add(key=FALLBACK_KEY, value=spec.fallback)
    return node


def set_attributes(node: onnx.NodeProto, **attributes) -> None:
    """Give a node of the domain com.qexport these attributes in place of what it has under their names.

    Raises:
        UsageError: as `make_node`.
    """
    kept = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name not in attributes}
    kept = {name: value.decode() if isinstance(value, bytes) else value for name, value in kept.items()}
    values = spec_of(node.op_type).resolve(kept | attributes)
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in values.items() if value is not None)


def function_proto(op_name: str, opset: int = 23, num_outputs: int = 1) -> onnx.FunctionProto:
    """The classical fallback of an op as a model-local function of the same domain and name.

    An onnxruntime without the op library runs this body in place of the kernel.

    Args:
        op_name: of the table, as `QuantumAttention`.
        opset: version of the ai.onnx domain of the model that will hold the function.
        num_outputs: how many outputs of the op the function has. onnxruntime wants exactly as many on each node that
            calls it: pad shorter nodes with "".

    Raises:
        UsageError: the op has no fallback, or none at that opset, or `num_outputs` is outside its limits.
    """
    spec = spec_of(op_name)
    if not spec.fallback:
        raise UsageError(f"[{op_name}] standard ONNX cannot do this: the file runs with the op library alone")
    if not 1 <= whole("num_outputs", num_outputs) <= len(spec.outputs):
        raise UsageError(f"[{op_name}] num_outputs must be from 1 to {len(spec.outputs)}, got {num_outputs}")
    nodes = import_module(f"qexport.ops.{spec.stem}").fallback_nodes(whole("opset", opset), num_outputs)
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
