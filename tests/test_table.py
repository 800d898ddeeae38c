"""The op table is the truth: each op has its kernel, adapter, reference, fallback, schema, test cases and page."""

import importlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from attention_backends import one_node_model, run_ort
from attention_cases import CASES
from noise_cases import CHANNELS, ELEMENTS, rows, run_node
from noise_cases import one_node_model as rows_model

from bench import figures, summary
from qexport import _core
from qexport.errors import UsageError
from qexport.ops import DOMAIN, OPS, QUANTUM_ATTENTION, QUANTUM_NOISE, VERSION
from qexport.ops.page import markdown_page, readme_table
from qexport.ops.proto import function_proto, make_node, register_schemas

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_every_op_is_whole(spec):
    assert callable(getattr(_core, spec.stem))
    reference = importlib.import_module(f"qexport.ops.{spec.stem}_ref")
    assert callable(getattr(reference, f"{spec.stem}_ref"))
    assert (ROOT / "cpp" / "include" / "qexport" / f"{spec.stem}.h").is_file()
    assert (ROOT / "custom_ops" / f"{spec.stem}.h").is_file()
    assert f"## {spec.name}\n" in markdown_page()
    if not spec.fallback:
        with pytest.raises(UsageError, match=f"{spec.name}.*standard ONNX cannot do this"):
            function_proto(spec.name, 23)
        return
    for opset in (17, 20, 23, 24):
        assert function_proto(spec.name, opset).node
    with pytest.raises(UsageError, match=f"{spec.name}.*needs opset 17 or newer, got 16"):
        function_proto(spec.name, 16)


def test_every_attribute_is_exercised_by_a_case():
    used = {name for case in CASES for name in case.all_attributes()}
    by_every_test = {"strategy", "num_samples", "control_variate", "layer", "qk_matmul_output_mode", "softmax_precision"}
    by_every_test |= {"precision", "error_tolerance", "residual"}
    assert {attr.name for attr in QUANTUM_ATTENTION.attributes} == used | by_every_test


def test_every_channel_is_exercised_by_a_case():
    """In every scope and convention; bases and renormalization are swept over all of them."""
    for name in ("channel", "scope", "convention"):
        assert {a.get(name, QUANTUM_NOISE.attribute(name).default) for a, _ in CHANNELS} == set(
            QUANTUM_NOISE.attribute(name).choices
        )
    swept = {"channel", "scope", "convention", "basis", "inverse", "renormalize"}
    assert {attr.name for attr in QUANTUM_NOISE.attributes} == swept


def test_op_page_is_up_to_date():
    assert (ROOT / "docs" / "ops.md").read_text() == markdown_page(), "run: qexport ops --markdown > docs/ops.md"


def test_figures_page_is_up_to_date():
    """Each table of it is made from the committed results."""
    assert (ROOT / "docs" / "figures.md").read_text() == figures.page(), "run: python -m bench.figures"


@pytest.mark.parametrize(("marks", "content"), [("ops", readme_table), ("figures", summary.markdown)])
def test_readme_is_up_to_date(marks, content):
    """The README's op table is the table's, and its figures are those of the committed results."""
    text = (ROOT / "README.md").read_text()
    block = text.split(f"<!-- {marks} -->")[1].split(f"<!-- /{marks} -->")[0]
    assert block.strip() == content().strip(), f"put this between the {marks} marks of README.md:\n{content()}"


@pytest.mark.parametrize("case", [c for c in CASES if c.name != "nothing_allowed"], ids=lambda case: case.name)
def test_schema_accepts_and_infers_what_the_kernel_returns(case):
    register_schemas()
    feeds = case.inputs()
    got = run_ort(feeds, "float32", 0, case.all_attributes())
    model = one_node_model(feeds, "float32", list(got), case.all_attributes())
    for value in model.graph.input:
        if value.name in feeds:
            for dim, size in zip(value.type.tensor_type.shape.dim, feeds[value.name].shape, strict=True):
                dim.dim_value = size
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes = {o.name: [d.dim_value for d in o.type.tensor_type.shape.dim] for o in inferred.graph.output}
    assert shapes == {name: list(value.shape) for name, value in got.items()}


@pytest.mark.parametrize("typed", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(8,), (2, 3, 5)])
@pytest.mark.parametrize(("op", "outputs"), [("QuantumNoise", ("noisy", "leak")), ("QuantumMeasure", ("frequencies",))])
def test_schema_accepts_and_infers_rows_of_probabilities(op, outputs, shape, typed):
    register_schemas()
    second = {"QuantumNoise": ("level", 0.5), "QuantumMeasure": ("seed", np.array(3))}[op]
    feeds = {"probabilities": rows(*shape), second[0]: np.asarray(second[1])}
    types = {"probabilities": typed} | (
        {"level": "float64" if typed == "float64" else "float32"} if op == "QuantumNoise" else {}
    )
    got = run_node(op, feeds, types, outputs, {})
    inferred = onnx.shape_inference.infer_shapes(rows_model(op, feeds, types, outputs, {}), strict_mode=True)
    shapes = [tuple(d.dim_value for d in o.type.tensor_type.shape.dim) for o in inferred.graph.output]
    assert shapes == [value.shape for value in got]
    named = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    assert named[f"{outputs[0]}_typed"] == ELEMENTS[typed]
    if op == "QuantumNoise":
        assert named["leak_typed"] == ELEMENTS[types["level"]]


@pytest.mark.parametrize("typed", ["float16", "float64"])
def test_schema_accepts_and_infers_overlaps(typed):
    register_schemas()
    feeds = {"queries": rows(2, 3, 5), "keys": rows(2, 4, 5), "level": np.asarray(0.5)}
    types = {"queries": typed, "keys": typed, "level": "float64" if typed == "float64" else "float32"}
    (got,) = run_node("QuantumOverlap", feeds, types, ("overlaps",), {})
    model = rows_model("QuantumOverlap", feeds, types, ("overlaps",), {})
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    assert tuple(d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim) == got.shape == (2, 3, 4)
    named = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    assert named["overlaps_typed"] == ELEMENTS[typed]


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_nodes_say_what_they_fall_back_to(spec):
    needed = [[p.name for p in params if not p.optional] for params in (spec.inputs, spec.outputs)]
    found = make_node(spec.name, *needed).metadata_props
    if not spec.fallback:
        assert not found
        return
    (entry,) = found
    assert (entry.key, entry.value) == ("qexport.fallback", spec.fallback)
    assert spec.fallback in function_proto(spec.name, 23).doc_string


def test_nodes_carry_every_default():
    node = make_node("QuantumAttention", ["q", "k", "v", "", ""], ["y"])
    assert node.domain == DOMAIN
    assert VERSION == 1
    assert list(node.input) == ["q", "k", "v"]
    assert {a.name for a in node.attribute} == {a.name for a in QUANTUM_ATTENTION.attributes if a.default is not None}


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"num_samples": 0}, r"num_samples must be >= 1, got 0"),
        ({"num_samples": []}, r"num_samples must hold at least one number"),
        ({"num_samples": "many"}, r"num_samples must be of kind ints, got 'many'"),
        ({"strategy": "best"}, r"strategy must be one of exact, naive, stratified, adaptive, hybrid, tree, got 'best'"),
        ({"softcap": float("nan")}, r"softcap must be >= 0, got nan"),
        ({"samples": 3}, r"has no attribute 'samples'; known: strategy, num_samples"),
    ],
)
def test_wrong_attributes(attributes, message):
    with pytest.raises(UsageError, match=message):
        make_node("QuantumAttention", ["q", "k", "v"], ["y"], **attributes)


def test_wrong_calls():
    with pytest.raises(UsageError, match="no op named 'Attention'"):
        make_node("Attention", ["q", "k", "v"], ["y"])
    with pytest.raises(UsageError, match="takes 3 to 9 inputs, got 2"):
        make_node("QuantumAttention", ["q", "k"], ["y"])
