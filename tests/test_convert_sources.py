"""convert of .onnx files as older and mixed tools write them: the file is taken, and both models compute what it does."""

import numpy as np
import onnx
import pytest
from decomposed import encoder, feeds
from onnx import helper

from qexport.bundle import Bundle
from qexport.conversion import convert
from qexport.data import stored_samples
from qexport.generated import generate
from qexport.runtime import session
from qexport.validation import validate

HALF_STEP = 2e-3  # two steps of a float16 near 1


def outputs(path, inputs, library):
    return session(path, library=library).run(None, inputs)


def test_ir_version_3_lists_all_weights_as_inputs(tmp_path):
    model = encoder()
    model.ir_version = 3
    model.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer)
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "m.onnx")
    report = convert(tmp_path / "m.onnx", tmp_path / "b", strategy="exact")
    assert len(report.sites) == 2
    expected = outputs(tmp_path / "m.onnx", feeds(), False)
    for library in (False, True):
        for a, b in zip(expected, outputs(tmp_path / "b" / "model.onnx", feeds(), library), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


def test_float16_inside_a_float32_model_has_the_rounding_of_float16(tmp_path):
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[b,4,l,8] q, float[b,4,s,8] k, float[b,4,s,8] v) => (float[b,4,l,8] y) {
        q1 = Cast<to=10>(q) k1 = Cast<to=10>(k) v1 = Cast<to=10>(v) kt = Transpose<perm=[0,1,3,2]>(k1)
        s = MatMul(q1, kt) p = Softmax<axis=-1>(s) o = MatMul(p, v1) y = Cast<to=1>(o)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    report = convert(tmp_path / "m.onnx", tmp_path / "b", strategy="exact")
    assert report.max_difference < HALF_STEP


@pytest.mark.parametrize(("padding", "kind", "made"), [("b", "lengths", 64), ("b,l", "mask", 1)])
def test_padding_of_the_runtimes_attention_is_made_up(tmp_path, padding, kind, made):
    text = f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
    g (float[b,l,32] x, int32[{padding}] keys) => (float[b,l,32] y) {{
        y = com.microsoft.MultiHeadAttention<num_heads=4>(x, x, x, , keys)
    }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    convert(tmp_path / "m.onnx", tmp_path / "b", strategy="exact")
    bundle = Bundle.open(tmp_path / "b")
    assert next(spec["kind"] for spec in bundle.manifest["inputs"] if spec["name"] == "keys") == kind
    assert (stored_samples(bundle).feeds[0]["keys"] == made).all()
    inputs = generate(bundle, batch=2, seq=40).feeds[0]
    if kind == "lengths":
        assert (inputs["keys"] == 40).all()
    inputs["keys"][1:] = np.arange(40) < 7 if kind == "mask" else 7
    expected = outputs(tmp_path / "m.onnx", inputs, False)
    for library in (False, True):
        for a, b in zip(expected, outputs(tmp_path / "b" / "model.onnx", inputs, library), strict=True):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


def test_the_default_domain_by_its_long_name(tmp_path):
    text = """<ir_version: 8, opset_import: ["ai.onnx": 17]>
    g (float[b,4,l,8] q, float[b,4,s,8] k, float[b,4,s,8] v, bool more) => (float[b,4,l,8] y) {
        kt = ai.onnx.Transpose<perm=[0,1,3,2]>(k) s = ai.onnx.MatMul(q, kt) p = ai.onnx.Softmax<axis=-1>(s)
        o = ai.onnx.MatMul(p, v)
        y = ai.onnx.If (more) <then_branch = t () => (float[b,4,l,8] a) { a = Add(o, o) },
                               else_branch = e () => (float[b,4,l,8] n) { n = Neg(o) }>
    }"""
    model = onnx.parser.parse_model(text)
    assert {node.domain for node in model.graph.node} == {"ai.onnx"}
    onnx.save(model, tmp_path / "m.onnx")
    assert len(convert(tmp_path / "m.onnx", tmp_path / "b", strategy="exact").sites) == 1
    rng = np.random.default_rng(0)
    inputs = {name: rng.standard_normal((2, 4, 6, 8)).astype(np.float32) for name in "qkv"} | {"more": np.array(True)}
    (expected,) = outputs(tmp_path / "m.onnx", inputs, False)
    for library in (False, True):
        (found,) = outputs(tmp_path / "b" / "model.onnx", inputs, library)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


BATCHED = """<ir_version: 8, opset_import: ["": 17]>
    g (float[b,n,32] x) => (float[b,n,32] y) <int64[4] split = {0, 0, 4, 8}, int64[1] minus = {-1}, int64[1] eight = {8},
      int64[1] one = {1}, int64[1] two = {2}, int64[1] four = {4}, int64[1] zero = {0}, int64[3] flat = {0, 0, 32}> {
      sh = Shape(x) b = Slice(sh, zero, one) n = Slice(sh, one, two) join = Concat<axis=0>(minus, n, eight)
      open = Concat<axis=0>(b, four, n, eight)
      h = Reshape(x, split) t = Transpose<perm=[0,2,1,3]>(h) q = Reshape(t, join) kt = Transpose<perm=[0,2,1]>(q)
      s = MatMul(q, kt) p = Softmax<axis=-1>(s) o = MatMul(p, q) o4 = Reshape(o, open)
      back = Transpose<perm=[0,2,1,3]>(o4) y = Reshape(back, flat) }"""


@pytest.mark.parametrize("names", [(None, None), ("?", "?"), ("batch", "sequence")])
def test_heads_joined_to_the_batch_are_counted_whatever_the_axes_are_called(tmp_path, names):
    model = onnx.parser.parse_model(BATCHED)
    for value in (*model.graph.input, *model.graph.output):
        for dim, name in zip(value.type.tensor_type.shape.dim, names, strict=False):
            dim.Clear() if name is None else setattr(dim, "dim_param", name)
    onnx.save(model, tmp_path / "m.onnx")
    site = convert(tmp_path / "m.onnx", tmp_path / "b", strategy="exact").sites[0]
    assert (site["q_heads"], site["kv_heads"], site["head_size"]) == (4, 4, 8)


@pytest.mark.parametrize(("name", "own"), [("?", True), ("None", True), ("-1", True), ("unk", True), ("s", False)])
def test_axes_that_are_all_called_alike(tmp_path, name, own):
    """A name that means nothing is said of batch and length; one that means something makes them equal."""
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[a,a,16] x, float[a,1,a] m) => (float[a,a,16] y) {
        xt = Transpose<perm=[0,2,1]>(x) s0 = MatMul(x, xt) s = Add(s0, m) p = Softmax<axis=-1>(s) y = MatMul(p, x)
    }"""
    model = onnx.parser.parse_model(text)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = name
    onnx.save(model, tmp_path / "m.onnx")
    convert(tmp_path / "m.onnx", tmp_path / "b", strategy="exact")
    shapes = [spec["shape"] for spec in Bundle.open(tmp_path / "b").manifest["inputs"]]
    assert shapes == ([["x_dim_0", "x_dim_1", 16], ["m_dim_0", 1, "m_dim_2"]] if own else [["s", "s", 16], ["s", 1, "s"]])
    if own:
        rng = np.random.default_rng(0)
        given = {"x": rng.standard_normal((3, 7, 16)).astype("f"), "m": rng.standard_normal((3, 1, 7)).astype("f")}
        assert validate(tmp_path / "b", given, seeds=1).passed
        assert validate(tmp_path / "b", batch=2, seq=5, seeds=1).outputs["fallback"]["y"]["elements"] == 2 * 5 * 16
