"""compress with arguments, data and bundles that it cannot take: each is one line that names the value and the mend, and
leaves nothing behind."""

import numpy as np
import onnx
import pytest
from bundle_factory import make_bundle
from compression_cases import HEAD, PRODUCT, model_of, random, refused, token_ids

from qexport import conversion
from qexport.bundle import Bundle
from qexport.compression import compress
from qexport.errors import QexportError, UsageError


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("small") / "bundle")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle", hidden=256)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 1}, ["compress.ratio", "above 1", "got 1"]),
        ({"ratio": float("nan")}, ["compress.ratio", "got nan"]),
        ({"ratio": float("inf")}, ["compress.ratio", "got inf"]),
        ({"ratio": None, "max_drop": 0}, ["compress.max_drop", "got 0"]),
        ({"ratio": None, "max_drop": 1.5}, ["compress.max_drop", "got 1.5"]),
        ({"max_drop": 0.1}, ["ratio and max_drop exclude each other"]),
        ({"methods": ["int2"]}, ["compress.methods", "int2"]),
        ({"metric": "bleu"}, ["metric must be one of perplexity, top1, cosine", "'bleu'"]),
        ({"opset": 16}, ["opset must be between 17 and 24", "16"]),
        ({"opset": 25}, ["opset must be between 17 and 24", "25"]),
        ({"task": "causal-lm"}, ["task", "Hugging Face", "lm.onnx"]),
        ({"batch": 0}, ["batch must be >= 1", "0"]),
        ({"heal": 5}, ["lm.onnx", "heal", "torch"]),
        ({"findings": 5}, ["findings must be a str or a Path", "5"]),
        ({"recipe": {"compress": {"layers": [{"match": "nix*", "methods": []}]}}}, ["layers[0].match", "'nix*'", "node_"]),
    ],
)
def test_wrong_arguments(lm, tmp_path, options, words):
    message = refused(tmp_path, lm, token_ids(), UsageError, **options)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"ids": np.zeros((2, 3), np.int64)}, ["no input 'ids'", "input_ids"]),
        ({"input_ids": np.zeros((2, 3), np.float32)}, ["input_ids", "int64", "float32"]),
        ({"input_ids": np.full((2, 3), 96)}, ["input_ids", "[0, 96)", "96"]),
        ({}, ["input_ids", "missing"]),
        ("nothing.npz", ["nothing.npz", "no such data file"]),
        (["a text"], ["lm.onnx", "takes no text"]),
    ],
)
def test_wrong_data(lm, tmp_path, data, words):
    message = refused(tmp_path, lm, tmp_path / data if isinstance(data, str) else data)
    for word in words:
        assert word in message


def test_a_bundle_with_small_weights_only(small_bundle, tmp_path):
    assert refused(tmp_path, small_bundle, None).startswith(f"{small_bundle}: holds no weights to compress")


def test_no_method_fits(lm, tmp_path):
    report = compress(lm, tmp_path / "out", token_ids(16), methods=[], ratio=3, profile=False)
    assert not report.passed
    assert report.size["ratio"] == pytest.approx(1, rel=0.01)
    assert report.metric["loss"] == 0


def test_what_is_compressed_already(bundle, tmp_path):
    compress(bundle, tmp_path / "first", None, ratio=1.5, profile=False)
    message = refused(tmp_path, tmp_path / "first", None)
    assert message == f"{tmp_path / 'first'}: is compressed already; compress the bundle or model it came from"
    onnx.save(model_of(PRODUCT, {"w": random(64, 64)}), tmp_path / "product.onnx")
    compress(tmp_path / "product.onnx", tmp_path / "second", None, ratio=3, profile=False)
    message = refused(tmp_path, tmp_path / "second" / "model.onnx", None)
    assert "a model that is quantised already has none" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "causal-lm"}, "task no longer changes"),
        ({"opset": 21}, "opset no longer changes"),
        ({"recipe": {"strategy": "exact"}}, "a recipe for attention no longer changes"),
        ({"heal": 3}, "heal needs a torch model"),
        ({"metric": "perplexity"}, "metric perplexity does not fit"),
    ],
)
def test_what_does_not_fit_a_bundle(bundle, tmp_path, options, words):
    message = refused(tmp_path, bundle, None, UsageError, **options)
    assert words in message
    assert str(bundle) in message


def test_attention_that_loses_more_than_is_allowed(tmp_path):
    """A single sample per query loses more than 1e-6 with the weights as they are."""
    make_bundle(tmp_path / "coarse", hidden=256, attention={"strategy": "naive", "num_samples": [1]})
    message = refused(tmp_path, tmp_path / "coarse", None, ratio=None, max_drop=1e-6)
    assert "with all weights as they were, above max_drop 1e-06" in message
    assert "sample attention less coarsely" in message


def test_data_that_fitting_saw_nothing_of(tmp_path):
    """The fourth batch alone opens the gate, so that `v` seems to matter to nothing."""
    model = model_of(
        f"""{HEAD} g (float[batch,64] x, float[batch,1] gate) => (float[batch,64] y) {{
        a = MatMul(x, w) b = MatMul(x, v) c = Mul(b, gate) y = Add(a, c) }}""",
        {"w": random(64, 64), "v": random(64, 64, seed=1)},
    )
    onnx.save(model, tmp_path / "gate.onnx")
    x = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    data = {"x": x, "gate": np.repeat(np.float32([0, 0, 0, 1]), 8)[:, None]}
    options = {"ratio": None, "methods": ["int4"], "max_drop": 1e-7}
    message = refused(tmp_path, tmp_path / "gate.onnx", data, kept=True, **options)
    assert "even in the most accurate forms, above max_drop 1e-07" in message
    report = compress(tmp_path / "gate.onnx", tmp_path / "out", data, max_drop=0.05, methods=["int4"], profile=False)
    assert "took up what another run had found" in report.notes


def test_one_item_is_judged_on_itself(lm, tmp_path):
    report = compress(lm, tmp_path / "out", token_ids(1), ratio=3, profile=False)
    assert report.passed
    assert (report.data["fitted"], report.data["judged"]) == (1, 1)
    assert any("judged on what the weights were fitted to" in note for note in report.notes)
    report = compress(lm, tmp_path / "out", None, ratio=3, profile=False)
    assert any("give --data" in note for note in report.notes)


def test_the_recipe_of_convert(lm, tmp_path):
    with pytest.raises(UsageError, match=r"compress.*qexport compress"):
        conversion.convert(lm, tmp_path / "out", recipe={"strategy": "exact", "compress": {"ratio": 4}})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken(lm, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds no bundle"):
        compress(lm, tmp_path / "mine", token_ids(), ratio=5, profile=False)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    for place in (tmp_path / "mine" / "thesis.txt", tmp_path / "mine" / "thesis.txt" / "more"):
        with pytest.raises(QexportError, match=r"thesis\.txt.*; choose another place"):
            compress(lm, tmp_path / "out", token_ids(), ratio=5, findings=place, profile=False)


def test_the_bundle_itself_is_not_replaced(bundle):
    with pytest.raises(UsageError, match=f"^{bundle}: the new bundle is made from what is there; choose another folder"):
        compress(Bundle.open(bundle), bundle, ratio=2, profile=False)
