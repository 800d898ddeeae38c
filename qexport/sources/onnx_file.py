""".onnx files of any exporter: read, checked, inlined and raised to the opset of the bundle. Needs no torch."""

from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from qexport.errors import QexportError
from qexport.external_data import check_external_data, load_structure
from qexport.manifest import IR_VERSION
from qexport.ops import DOMAIN
from qexport.rewrite.convert_opset import convert_opset
from qexport.sources.examples import make_examples
from qexport.sources.modules import name_modules
from qexport.sources.quiet import reason_of
from qexport.sources.source import Source
from qexport.sources.specs import limits_of, name_axes, spec_of

# Ops that onnxruntime's optimizer writes into ai.onnx whatever the opset.
RUNTIME_OPS = ("LayerNormalization", "SimplifiedLayerNormalization")
OLDEST_OPSET, NEWEST_OPSET = 11, 24
# Domains whose ops onnxruntime itself holds; whether it knows the op is seen when the file is run.
RUNTIME_DOMAINS = ("com.microsoft", "com.microsoft.nchwc", "ai.onnx.ml", "ai.onnx.preview.training")


def open_file(path: Path, *, opset: int) -> Source:
    """Read an .onnx file and bring it to `opset`; a file at 24 stays there when 23 is asked for.

    Raises:
        QexportError: not an ONNX model, cut short, older than opset 11, an op that nothing runs, external data that is
            missing or outside the folder, inputs or outputs that are no tensors of numbers, sparse weights, already
            converted, or it cannot be raised.
    """
    structure = load_structure(path)
    check_external_data(path, structure)
    _check_opset(path, structure)
    _check_ops(path, structure)
    _check_values(path, structure)
    try:
        model = ir.load(path)
    except Exception as error:
        raise QexportError(f"{path}: cannot be read: {reason_of(error)}") from error
    if "ai.onnx" in model.opset_imports:  # the long name of the domain, which onnx-ir shortens to "" at every node
        model.opset_imports.setdefault("", model.opset_imports.pop("ai.onnx"))
    if any(node.op_type == "QuantumAttention" and node.domain == DOMAIN for node in model.graph.all_nodes()):
        raise QexportError(f"{path}: holds QuantumAttention already; convert the classical model it was made from")
    if model.functions:
        passes.InlinePass()(model)
    name_modules(model)
    name_axes(model)
    passes.RemoveInitializersFromInputsPass()(model)
    model.ir_version = max(model.ir_version, IR_VERSION)  # before version 4 they had to be inputs
    passes.LiftSubgraphInitializersToMainGraphPass()(model)
    present = model.opset_imports.get("", opset)
    # what Softmax means below 13 depends on the number of axes, and what the converter's own inference leaves open stays so
    infer_shapes(model)
    model = convert_opset(model, min(max(opset, present), NEWEST_OPSET) if opset >= 23 else opset, str(path))
    infer_shapes(model)
    inputs = [spec_of(value) for value in model.graph.inputs]
    source = Source("onnx", path.name, model, inputs, {}, limits=limits_of(model, inputs))
    make_examples(source, path)
    return source


def infer_shapes(model: ir.Model) -> None:
    """onnx's shape inference, with the sizes it can compute; a graph that it cannot follow stays as it is."""
    try:
        passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    except Exception:  # quantised and odd graphs trip it; the rules then see fewer sizes and decline more
        return


def _check_opset(path: Path, model: onnx.ModelProto) -> None:
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version < OLDEST_OPSET:
            raise QexportError(f"{path}: is at opset {entry.version}; {OLDEST_OPSET} or newer is needed, export it again")
        if entry.domain in ("", "ai.onnx") and entry.version > onnx.defs.onnx_opset_version():
            newest = onnx.defs.onnx_opset_version()
            raise QexportError(f"{path}: is at opset {entry.version}, this onnx knows {newest}: pip install -U onnx")


def _check_ops(path: Path, model: onnx.ModelProto) -> None:
    """Every op must be standard, of onnxruntime, or have a function in the file."""
    version = next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), onnx.defs.onnx_opset_version())
    functions = {(f.domain, f.name) for f in model.functions}
    graphs = [model.graph]
    while graphs:
        for node in graphs.pop().node:
            for attribute in node.attribute:
                graphs.extend([attribute.g] if attribute.HasField("g") else attribute.graphs)
            if (node.domain, node.op_type) in functions or node.domain in RUNTIME_DOMAINS:
                continue
            where = f"{path}: node {node.name or node.output[0]!r}"
            if node.domain in ("", "ai.onnx"):
                if not onnx.defs.has(node.op_type, version, "") and node.op_type not in RUNTIME_OPS:
                    raise QexportError(
                        f"{where}: opset {version} has no op {node.op_type}; the file is damaged or mislabelled"
                    )
            elif node.domain != DOMAIN:
                raise QexportError(
                    f"{where}: op {node.domain}:{node.op_type} has no function in the file, so no onnxruntime runs it; "
                    "export the model without it"
                )


def _check_values(path: Path, model: onnx.ModelProto) -> None:
    """Inputs and outputs must be tensors of numbers, inputs of known rank, and weights dense."""
    if model.graph.sparse_initializer:
        name = model.graph.sparse_initializer[0].values.name
        raise QexportError(f"{path}: weight {name!r} is stored sparse, which is not taken; store it as a dense initializer")
    weights = {tensor.name for tensor in model.graph.initializer}  # which old files list among the inputs
    for what, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            kind = value.type.WhichOneof("value")
            if kind == "tensor_type" and value.type.tensor_type.elem_type == onnx.TensorProto.STRING:
                kind = "tensor of strings"
            if kind not in ("tensor_type", None):
                found = kind.removesuffix("_type").replace("_", " ")
                raise QexportError(f"{path}: {what} {value.name!r} is a {found}; export the model with tensors of numbers")
            if what == "input" and value.name not in weights and not value.type.tensor_type.HasField("shape"):
                raise QexportError(
                    f"{path}: input {value.name!r} has no shape; export it with one, of axes that may be dynamic"
                )
