"""inspect: what a bundle or an .onnx file holds, without running it."""

import math
from collections import Counter

import onnx
from onnx import TensorProto, helper

from qexport.arguments import as_path
from qexport.bundle import Bundle, sha256
from qexport.documents import make_document
from qexport.errors import QexportError
from qexport.external_data import check_external_data, external_files, file_bytes, load_structure
from qexport.ops import DOMAIN
from qexport.ops.proto import FALLBACK_KEY

# The first release of onnxruntime that reads an opset or IR version as official.
RUNTIME_OF_OPSET = {
    17: "1.13",
    18: "1.14",
    19: "1.15",
    20: "1.17",
    21: "1.18",
    22: "1.21",
    23: "1.23",
    24: "1.24",
    25: "1.25",
}
RUNTIME_OF_IR = {8: "1.11", 9: "1.15", 10: "1.18", 11: "1.21", 12: "1.23", 13: "1.24"}
ATTENTION_OPS = {
    ("", "Attention"),
    ("com.microsoft", "Attention"),
    ("com.microsoft", "MultiHeadAttention"),
    ("com.microsoft", "GroupQueryAttention"),
    (DOMAIN, "QuantumAttention"),
}

NOISE_OPS = {(DOMAIN, "QuantumNoise"), (DOMAIN, "QuantumMeasure")}


def inspect(path) -> dict:
    """Describe a bundle (its converted model) or an .onnx file.

    Args:
        path: folder of a bundle, or an .onnx file.

    Returns:
        Plain data: the JSON of `qexport inspect --json`, see docs/json_schema.md. The keys `recipe`, `left_alone`,
        `compression`, `source`, `limits`, `created` and `changed_files` are None for a bare file.

    Raises:
        QexportError: neither a bundle nor an ONNX file, or external data is missing or outside its folder.
    """
    path = as_path("path", path)
    if not path.exists():
        raise QexportError(f"{path}: no such file or folder")
    bundle = Bundle.open(path) if path.is_dir() else None
    file = bundle.model_path if bundle else path
    model = load_structure(file)
    check_external_data(file, model)
    manifest = bundle.manifest if bundle else {}
    external = external_files(model)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    parameters, parameter_bytes = _parameters(model)
    nodes = list(_nodes(model.graph))
    content = {
        "path": str(path),
        "kind": "bundle" if bundle else "model",
        "source": manifest.get("source"),
        "created": manifest.get("created"),
        "ir_version": model.ir_version,
        "opsets": opsets,
        "producer": " ".join(part for part in (model.producer_name, model.producer_version) if part),
        "min_onnxruntime": manifest.get("min_onnxruntime") or oldest_runtime(opsets.get("ai.onnx", 0), model.ir_version),
        "inputs": _values(model, model.graph.input),
        "outputs": _values(model, model.graph.output),
        "ops": dict(Counter(_op_name(node) for node in nodes).most_common()),
        "nodes": len(nodes),
        "functions": [f"{function.domain}:{function.name}" for function in model.functions],
        "fallbacks": _fallbacks(nodes),
        "attention": [_attention(node) for node in nodes if (node.domain, node.op_type) in ATTENTION_OPS],
        "noise": [_attention(node) for node in nodes if (node.domain, node.op_type) in NOISE_OPS],
        "recipe": manifest.get("recipe"),
        "left_alone": manifest.get("left_alone"),
        "compression": manifest.get("compression"),
        "limits": manifest.get("limits"),
        "parameters": parameters,
        "parameter_bytes": parameter_bytes,
        "file_bytes": file_bytes(file),
        "external_files": sorted(external),
        "sha256": sha256(file),
        "changed_files": bundle.changed_files() if bundle else None,
    }
    return make_document("inspect", content)


def oldest_runtime(opset: int, ir_version: int) -> str | None:
    """The first onnxruntime that reads both; None when that is not known."""
    oldest_opset, oldest_ir = min(RUNTIME_OF_OPSET), min(RUNTIME_OF_IR)
    needed = [RUNTIME_OF_OPSET.get(max(opset, oldest_opset)), RUNTIME_OF_IR.get(max(ir_version, oldest_ir))]
    if None in needed:
        return None
    return max(needed, key=lambda version: [int(part) for part in version.split(".")])


def _nodes(graph):
    """The nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(inner)


def _op_name(node) -> str:
    return f"{node.domain}:{node.op_type}" if node.domain and node.domain != "ai.onnx" else node.op_type


def _fallbacks(nodes) -> dict[str, str]:
    """What each op of the domain com.qexport says that it computes without the op library."""
    said = {}
    for node in nodes:
        texts = [entry.value for entry in node.metadata_props if entry.key == FALLBACK_KEY]
        if node.domain == DOMAIN and texts:
            said[_op_name(node)] = texts[0]
    return said


def _values(model, values) -> list[dict]:
    """Name, type and shape of graph inputs or outputs; an input with a default is optional, a weight is no input."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    entries = []
    for value in values:
        tensor = value.type.tensor_type
        shape = None
        if tensor.HasField("shape"):
            shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
        dtype = TensorProto.DataType.Name(tensor.elem_type).lower() if tensor.elem_type else value.type.WhichOneof("value")
        entries.append({"name": value.name, "dtype": dtype, "shape": shape, "optional": value.name in defaults})
    # files of IR 3 and older list every weight as an input
    return [entry for entry in entries if not entry["optional"]] if len(entries) > 64 else entries


def _attention(node) -> dict:
    """An attention node with the attributes that say how it computes."""
    attributes = {a.name: _plain(helper.get_attribute_value(a)) for a in node.attribute if not a.ref_attr_name}
    properties = {entry.key: entry.value for entry in node.metadata_props}
    return {
        "name": node.name,
        "op": _op_name(node),
        "module": properties.get("qexport.module"),
        "output": node.output[0] if node.output else None,
        "attributes": attributes,
    }


def _plain(value):
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (str, int, float)):
        return value
    if hasattr(value, "DESCRIPTOR"):  # a tensor or a graph
        return type(value).__name__
    return [_plain(item) for item in value]


def _parameters(model: onnx.ModelProto) -> tuple[int, int]:
    """Number of elements and bytes of the initializers."""
    count = size = 0
    for tensor in model.graph.initializer:
        elements = math.prod(tensor.dims)
        count += elements
        try:
            bits = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
        except KeyError:  # a type that this onnx does not know
            bits = 8
        if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
            bits = 4
        size += (elements * bits + 7) // 8
    return count, size
