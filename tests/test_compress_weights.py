"""compress with odd weights and graphs: what is refused, and what goes through."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from compression_cases import HEAD, PRODUCT, language_model, model_of, random, refused, token_ids

from qexport.compression import compress


@pytest.mark.parametrize(("value", "count"), [(np.inf, 2), (-np.inf, 1), (np.nan, 1)])
def test_weights_that_are_not_finite(tmp_path, value, count, recwarn):
    def planted(w):
        w.flat[:count] = value
        return w

    # in the table, so that one token alone meets it
    path = language_model(tmp_path / "lm.onnx", words=planted)
    message = refused(tmp_path, path, token_ids())
    assert message == f"{path}: weight words holds {count} NaN or infinite values; mend it"
    assert not [
        (str(warning.message), warning.filename, warning.lineno)
        for warning in recwarn.list
        if warning.category is RuntimeWarning
    ]


def test_weights_that_overflow(tmp_path, recwarn):
    path = language_model(tmp_path / "large.onnx", up=lambda w: w * 1e25)
    message = refused(tmp_path, path, token_ids(), metric="top1")
    assert message.startswith(f"{path}: the inputs of ")
    assert "are not finite on this data, or their squares are not" in message
    path = language_model(tmp_path / "sharp.onnx", down=lambda w: w * 1e6)
    message = refused(tmp_path, path, token_ids())
    assert message == f"{path}: the classical model has perplexity inf on this data; choose another metric"
    assert compress(path, tmp_path / "out", token_ids(), ratio=3, metric="top1", profile=False).passed
    assert not [
        (str(warning.message), warning.filename, warning.lineno)
        for warning in recwarn.list
        if warning.category is RuntimeWarning
    ]


def test_inputs_that_overflow_behind_others(tmp_path):
    """What the weight before was seen with serves no run on this model."""
    model = model_of(
        f"{HEAD} g (float[batch,64] x) => (float[batch,64] y) {{ a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }}",
        {"w": random(64, 128) * 1e25, "v": random(128, 64, seed=1) * 1e-25},
    )
    onnx.save(model, tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    message = refused(tmp_path, tmp_path / "model.onnx", {"x": x})
    assert message.startswith(f"{tmp_path / 'model.onnx'}: the inputs of node_2 are not finite")


def of_rank_5(w):
    return random(w.shape[0], 5, seed=8) @ random(5, w.shape[1], seed=9)


@pytest.mark.parametrize("name", ["up", "words", "wq"])
@pytest.mark.parametrize(
    "change", [np.zeros_like, of_rank_5, lambda w: np.full_like(w, 0.1)], ids=["zero", "rank 5", "constant"]
)
def test_odd_weights(tmp_path, name, change, recwarn):
    path = language_model(tmp_path / "lm.onnx", **{name: change})
    report = compress(path, tmp_path / "out", token_ids(16), ratio=5, profile=False)
    assert report.passed
    assert report.metric["loss"] < 0.02
    assert not [
        (str(warning.message), warning.filename, warning.lineno)
        for warning in recwarn.list
        if warning.category is RuntimeWarning
    ]


def test_a_weight_in_a_constant_node(tmp_path):
    model = model_of(PRODUCT, {})
    weight = onnx.numpy_helper.from_array(random(64, 64))
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=weight))
    onnx.save(model, tmp_path / "constant.onnx")
    x = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    report = compress(tmp_path / "constant.onnx", tmp_path / "out", {"x": x}, ratio=3, profile=False)
    assert report.passed


@pytest.mark.parametrize("ratio", [3, 5])
def test_prime_shapes(tmp_path, ratio):
    model = model_of(
        f"""{HEAD} g (float[batch,127] x) => (float[batch,67] y) {{
        a = MatMul(x, w) b = Relu(a) c = MatMul(b, v) y = Gemm<transB=1>(c, u, bias) }}""",
        {"w": random(127, 131), "v": random(131, 97), "u": random(67, 97), "bias": random(67)},
    )
    onnx.save(model, tmp_path / "prime.onnx")
    x = np.random.default_rng(0).standard_normal((400, 127)).astype(np.float32)
    report = compress(tmp_path / "prime.onnx", tmp_path / "out", {"x": x}, ratio=ratio, profile=False)
    assert report.passed
    assert report.metric["loss"] < 0.02
    assert [layer["shape"] for layer in report.layers] == [[127, 131], [131, 97], [67, 97]]


def test_a_table_of_prime_width(tmp_path):
    """Whole numbers of a table need whole blocks: float16 and factors are what is left."""
    text = f"{HEAD} g (int64[batch,n] i) => (float[batch,n,61] y) {{ h = Gather(w, i) y = Relu(h) }}"
    onnx.save(model_of(text, {"w": random(127, 61)}), tmp_path / "table.onnx")
    ids = {"i": np.random.default_rng(0).integers(0, 127, (64, 9))}
    for ratio, kind in ((1.5, "fp16"), (3, "rank 32")):
        report = compress(tmp_path / "table.onnx", tmp_path / "out", ids, ratio=ratio, profile=False)
        assert report.passed
        assert report.layers[0]["method"].startswith(kind)


NOTHING = {
    "convolutions": (
        "g (float[batch,8,9,9] x) => (float[batch,64,9,9] y) { y = Conv<pads=[1,1,1,1]>(x, w) }",
        {"w": random(64, 8, 3, 3)},
    ),
    "QDQ": (
        "g (float[batch,64] x) => (float[batch,64] y) { d = DequantizeLinear<axis=1>(w, s) y = MatMul(x, d) }",
        {"w": np.ones((64, 64), np.int8), "s": np.full(64, 0.01, np.float32)},
    ),
    "MatMulInteger": (
        """g (float[batch,64] x) => (float[batch,64] y) {
        q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z) f = Cast<to=1>(i) y = Mul(f, s) }""",
        {"w": np.ones((64, 64), np.int8)},
    ),
    "no weights": ("g (float[batch,64] x) => (float[batch,64] y) { y = Relu(x) }", {}),
}


@pytest.mark.parametrize("case", NOTHING)
def test_nothing_to_compress(tmp_path, case):
    text, weights = NOTHING[case]
    onnx.save(model_of(f"{HEAD} {text}", weights), tmp_path / "model.onnx")
    message = refused(tmp_path, tmp_path / "model.onnx", None)
    assert message.startswith(f"{tmp_path / 'model.onnx'}: holds no weights to compress: ")
    assert "4096" in message


def test_bfloat16_that_onnxruntime_cannot_run(tmp_path):
    path = language_model(tmp_path / "lm.onnx", dtype=ml_dtypes.bfloat16)
    assert "where they are bfloat16, run it with --provider cuda" in refused(tmp_path, path, token_ids())
