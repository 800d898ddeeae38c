"""Run a rule on a small graph and compare before and after in onnxruntime."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from qexport.installed import get_library_path
from qexport.recipe import Recipe
from qexport.rewrite.classical import to_classical
from qexport.rewrite.convert_opset import convert_opset
from qexport.rewrite.sample_attention import attach_fallback, sample_attention
from qexport.sources.onnx_file import infer_shapes

SIZES = {"b": 2, "l": 5, "s": 7, "n": 6, "t": 3}
TOLERANCE = {"float16": 2e-3}  # two steps of a number near 1
PLAIN = 1e-5  # float32 with at most 64-term sums


def parse(text: str) -> onnx.ModelProto:
    """A model in onnx.parser's language, checked."""
    model = onnx.parser.parse_model(text)
    for index, node in enumerate(model.graph.node):
        node.name = f"/block/attention/{node.op_type}_{index}"
    return model


def feeds(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs: masks keep the first key, so that no row is empty; index inputs stay within 12 columns."""
    rng = np.random.default_rng(seed)
    result = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value or SIZES[d.dim_param] for d in tensor.shape.dim)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype == np.bool_:
            array = rng.random(shape) < 0.6
            if shape:
                array[..., 0] = True
        elif value.name == "pad":
            array = np.arange(shape[1]) < np.array([[shape[1]], [shape[1] - 3]])
        elif np.issubdtype(dtype, np.integer):
            array = rng.integers(0, 12, shape)
        else:
            array = rng.standard_normal(shape)
        result[value.name] = np.asarray(array, dtype)
    return result


def run(model: onnx.ModelProto, inputs: dict, library: bool = False) -> list[np.ndarray]:
    """Outputs on the CPU provider, without graph optimisations that would hide a wrong node."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(get_library_path())
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, inputs)


def lowered(source: onnx.ModelProto, opset: int) -> ir.Model:
    """The classical form of a model."""
    model = convert_opset(ir.from_proto(source), opset, "test")
    infer_shapes(model)
    to_classical(model, opset)
    model.ir_version = 10
    return model


class Rewritten:
    """A model on its way through the passes at `opset`: `classical` and `sampled` protos, sites and left_alone."""

    def __init__(self, source: onnx.ModelProto, opset: int = 23, recipe: Recipe | None = None):
        model = convert_opset(ir.from_proto(source), opset, "test")
        infer_shapes(model)
        before = ir.to_proto(model)
        self.left_alone = to_classical(model, opset)
        self.classical = ir.to_proto(model) if opset >= 23 else before
        self.sites, more = sample_attention(model, recipe or Recipe(strategy="stratified"))
        self.left_alone += more
        attach_fallback(model)
        model.ir_version = 10
        self.sampled = ir.to_proto(model)

    def ops(self, which: str = "classical") -> list[str]:
        """Op types of the main graph."""
        return [node.op_type for node in getattr(self, which).graph.node]


def assert_same(expected: list, got: list) -> None:
    """Outputs are equal up to rounding, NaN at the same places."""
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        tolerance = TOLERANCE.get(a.dtype.name, PLAIN)
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)
