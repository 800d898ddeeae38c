"""Small models whose weights are large enough to be compressed, made without torch."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from qexport.bundle import sha256
from qexport.compression import compress
from qexport.errors import QexportError

VOCAB, WIDTH, HIDDEN = 96, 64, 160
HEAD = '<ir_version: 10, opset_import: ["": 23]>'
PRODUCT = f"{HEAD} g (float[batch,64] x) => (float[batch,64] y) {{ y = MatMul(x, w) }}"

_LANGUAGE_MODEL = f"""
<ir_version: 10, opset_import: ["": 23]>
g (int64[batch,sequence] input_ids) => (float[batch,sequence,{VOCAB}] logits) {{
  x = Gather(words, input_ids)
  q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
  y = Attention<q_num_heads=4, kv_num_heads=4, is_causal=1>(q, k, v)
  o = MatMul(y, wo) h = Add(x, o) u = MatMul(h, up) r = Relu(u) d = MatMul(r, down) z = Add(h, d)
  head = Transpose<perm=[1,0]>(words) logits = MatMul(z, head) }}"""
_SHAPES = {
    "words": (VOCAB, WIDTH),
    **{f"w{i}": (WIDTH, WIDTH) for i in "qkvo"},
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}


def model_of(text: str, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The model of a text in onnx's own syntax, with its weights."""
    model = onnx.parser.parse_model(text)
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def random(*shape, seed: int = 0, dtype=np.float32) -> np.ndarray:
    """Numbers of a normal distribution; the columns of a matrix have norm 1 on average."""
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[0])).astype(dtype)


def correlated(samples: int, width: int, rho: float = 0.9) -> np.ndarray:
    """Inputs (samples, width), each entry correlated with the one before it."""
    noise = np.random.default_rng(1).standard_normal((samples, width))
    for i in range(1, width):
        noise[:, i] = rho * noise[:, i - 1] + (1 - rho**2) ** 0.5 * noise[:, i]
    return noise.astype(np.float32)


def language_model(path, *, dtype=np.float32, **changes):
    """A one-layer language model with a head tied to its embedding, in a file; its path.

    Args:
        changes: called with a weight of that name, give what takes its place.
    """
    model = onnx.parser.parse_model(_LANGUAGE_MODEL)
    for i, (name, shape) in enumerate(_SHAPES.items()):
        array = random(*shape, seed=i) * (shape[0] / shape[1]) ** (0.5 * (name == "words"))
        array = changes[name](array) if name in changes else array
        model.graph.initializer.append(numpy_helper.from_array(array.astype(dtype), name))
    if dtype != np.float32:
        model.graph.output[0].type.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    onnx.save(model, path)
    return path


def token_ids(items: int = 32, length: int = 12) -> dict[str, np.ndarray]:
    """Inputs of `language_model`."""
    return {"input_ids": np.random.default_rng(0).integers(0, VOCAB, (items, length))}


def run(model: onnx.ModelProto, feed: dict) -> np.ndarray:
    """The first output of a model in a stock onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def with_weight(model: onnx.ModelProto, name: str, array: np.ndarray) -> onnx.ModelProto:
    """A copy with another value of a weight, whose type stays."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensor = next(tensor for tensor in changed.graph.initializer if tensor.name == name)
    assert tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
    tensor.CopyFrom(numpy_helper.from_array(array.astype(numpy_helper.to_array(tensor).dtype), name))
    return changed


RUNTIME_OPS = {"MatMulNBits", "GatherBlockQuantized"}


def ops(path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


def files(folder) -> dict[str, str]:
    """Digests of everything in a folder."""
    return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def relative(value, expected) -> float:
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))


def refused(tmp_path, model, data, kind=QexportError, kept: bool = False, **options) -> str:
    """The message of an error that leaves nothing behind, or with `kept` what was found, for another goal."""
    options = {"profile": False, "ratio": 3} | options
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(kind) as caught:
        compress(model, tmp_path / "out", data, **options)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert ".partial" not in str(caught.value)  # the folder of a bundle in the making
    found = [".out.compress"] if kept else []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(before + found)
    return str(caught.value)
