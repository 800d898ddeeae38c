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
