"""Where the weights of an ONNX file outside the file itself are, checked before anyone reads them."""

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from qexport.errors import QexportError


def load_structure(path) -> onnx.ModelProto:
    """The model of an .onnx file without its external data.

    Raises:
        QexportError: the file is missing, no ONNX model, or cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise QexportError(f"{path}: no such model file")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)  # whatever it is called
    except (DecodeError, ValueError) as error:
        raise QexportError(f"{path}: not an ONNX model, or cut short ({path.stat().st_size} bytes)") from error
    except OSError as error:
        raise QexportError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise QexportError(f"{path}: not an ONNX model, or cut short ({path.stat().st_size} bytes)")
    return model


def external_files(model: onnx.ModelProto) -> dict[str, tuple[str, int]]:
    """The external files that the initializers of a model name: location -> (a tensor in it, the bytes it must have)."""
    files: dict[str, tuple[str, int]] = {}
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        if location not in files or files[location][1] < end:
            files[location] = (tensor.name, end)
    return files


def file_bytes(path) -> int:
    """Bytes of a model's file and of the files that its weights lie in."""
    path = Path(path)
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in external_files(load_structure(path)))


def check_external_data(path, model: onnx.ModelProto | None = None) -> None:
    """Check that every external file of a model is there, long enough, and inside the model's own folder.

    Raises:
        QexportError: names the tensor, the file and what is wrong.
    """
    path = Path(path)
    folder = path.parent.resolve()
    for location, (tensor, end) in external_files(model if model is not None else load_structure(path)).items():
        file = (folder / location).resolve()
        where = f"{path}: external data {location!r} of {tensor!r}"
        if not location or Path(location).is_absolute() or not file.is_relative_to(folder):
            raise QexportError(f"{where} is outside the folder of the model; put it beside the model")
        if not file.is_file():
            raise QexportError(f"{where} is missing; copy it to {folder} too")
        if file.stat().st_size < end:
            raise QexportError(f"{where} has {file.stat().st_size} bytes, {end} are needed; copy it again")


def _tensors(model: onnx.ModelProto):
    """Every initializer and constant of a model, those of subgraphs included."""
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                graphs.extend(attribute.graphs)
