"""compress with what it cannot take: each is one line that names the value and the mend, and leaves nothing behind; and the
command line.
"""

import json
import shutil

import ml_dtypes
import numpy as np
import onnx
import pytest
from bundle_factory import make_bundle
from compression_cases import language_model, model_of, random, token_ids

from qexport import conversion
from qexport.compression import SCHEMA, compress
from qexport.errors import QexportError, UsageError

HEAD = '<ir_version: 10, opset_import: ["": 23]>'


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return language_model(tmp_path_factory.mktemp("lm") / "lm.onnx")


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("small") / "bundle")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle", hidden=256)


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


PRODUCT = f"{HEAD} g (float[batch,64] x) => (float[batch,64] y) {{ y = MatMul(x, w) }}"


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


def test_bfloat16_that_onnxruntime_cannot_run(tmp_path):
    path = language_model(tmp_path / "lm.onnx", dtype=ml_dtypes.bfloat16)
    assert "cannot load it" in refused(tmp_path, path, token_ids())


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


def test_a_full_disk_while_the_model_is_written(lm, tmp_path, monkeypatch):
    """What was found stays for the next run, the bundle that was there is as it was."""
    compress(lm, tmp_path / "out", token_ids(), ratio=2, profile=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    save = conversion.save

    def full(model, path, external):
        if path.name != "compressed.onnx":
            return save(model, path, external)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "save", full)
    with pytest.raises(QexportError, match=r"out: the disk is full or over its limit") as caught:
        compress(lm, tmp_path / "out", token_ids(), ratio=5, profile=False)
    (note,) = caught.value.__notes__
    assert note.startswith(f"what was found so far is kept in {tmp_path / '.out.compress'}: ")
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.compress"}
    report = compress(lm, tmp_path / "out", token_ids(), ratio=5, profile=False)
    assert any("took up" in note for note in report.notes)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_models_that_cannot_be_timed(qexport, lm, tmp_path, monkeypatch):
    """The same without timing takes up what was found, wherever that is kept."""

    def failing(*args, **kwargs):
        raise QexportError("no timer")

    monkeypatch.setattr("qexport.profiling.profile", failing)
    np.savez(tmp_path / "data.npz", **token_ids())
    words = ("compress", lm, "-o", tmp_path / "out", "--ratio", "5", "--data", tmp_path / "data.npz", "-q")
    for findings in ((), ("--findings", tmp_path / "findings")):
        code, _, err = qexport(*words, *findings)
        (folder,) = (tmp_path / "findings").iterdir() if findings else [tmp_path / ".out.compress"]
        assert code == 1
        assert err.startswith(f"qexport: error: no timer; what was found so far is kept in {folder}: ")
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()
        code, out, _ = qexport(*words, *findings, "--no-profile")
        assert code == 0
        assert "took up what another run had found" in out
        assert folder.exists() == bool(findings)
        shutil.rmtree(tmp_path / "out")


def test_findings_that_cannot_be_kept(lm, tmp_path):
    (tmp_path / ".out.compress").write_text("a file of that name")
    with pytest.raises(QexportError, match=r"\.out\.compress: cannot store a finding \(File exists\)"):
        compress(lm, tmp_path / "out", token_ids(), ratio=5, profile=False)
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken(lm, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds no bundle"):
        compress(lm, tmp_path / "mine", token_ids(), ratio=5, profile=False)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_command(qexport, lm, bundle, tmp_path):
    np.savez(tmp_path / "data.npz", **token_ids())
    data = ("--data", tmp_path / "data.npz")
    code, out, err = qexport("compress", lm, "-o", tmp_path / "out", "--ratio", "5", *data, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["schema"], found["passed"]) == (SCHEMA, True)
    assert found["profile"]["bundle"] == str(tmp_path / "out")
    assert set(found["profile"]["sizes"][0]["models"]) == {"classical", "converted"}
    code, out, err = qexport("compress", lm, "-o", tmp_path / "out", "--ratio", "50", *data, "--no-profile")
    assert code == 3
    assert "FAILED: a ratio of 50 cannot be reached" in out
    assert f"next: qexport validate {tmp_path / 'out'}" in out
    code, out, err = qexport("compress", lm, "-o", tmp_path / "out", "--ratio", "50", *data, "--no-profile", "--json")
    assert (code, json.loads(out)["passed"]) == (3, False)
    code, out, _ = qexport("compress", bundle, "-o", tmp_path / "out", "--ratio", "2", "--no-profile", "-v", "-q")
    assert code == 0
    for words in ("note: ", "Weights", "layer0.up", "x smaller", "cosine", "error of hidden"):
        assert words in out


@pytest.mark.parametrize(
    ("words", "expected", "message"),
    [
        (("--ratio", "1"), 2, "compress.ratio: must be a number above 1"),
        (("--ratio", "nan"), 2, "got nan"),
        (("--max-drop", "100%"), 2, "compress.max_drop: must lie between 0 and 1"),
        (("--max-drop", "nan"), 2, "got nan"),
        (("--ratio", "3", "--max-drop", "1%"), 2, "exclude each other"),
        (("--methods", "int8,int3"), 2, "'int8,int3'"),
        (("--heal", "5"), 2, "heal needs a torch model"),
        (("--task", "causal-lm"), 2, "Hugging Face"),
        (("--metric", "cosine", "--data", "no.npz"), 1, "no.npz: no such data file"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(qexport, lm, tmp_path, words, expected, message):
    code, out, err = qexport("compress", lm, "-o", tmp_path / "out", "-q", *words)
    assert (code, out) == (expected, "")
    assert err.startswith("qexport: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("--ratio", "much"), ("--max-drop", "little"), ("--opset", "16"), ("--metric", "bleu")])
def test_the_command_with_words_that_are_none(qexport, lm, tmp_path, words):
    code, out, err = qexport("compress", lm, "-o", tmp_path / "out", *words)
    assert (code, out) == (2, "")
    assert words[1] in err


def test_the_command_and_a_recipe(qexport, lm, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("compress:\n  ratio: 3\n  size: 4\n")
    code, _, err = qexport("compress", lm, "-o", tmp_path / "out", "--config", recipe)
    assert code == 2
    assert f"{recipe}: compress.size: no such key" in err
    recipe.write_text("compress:\n  ratio: 3\n")
    code, out, _ = qexport("convert", lm, "-o", tmp_path / "out", "--config", recipe)
    assert (code, out) == (2, "")
    assert not (tmp_path / "out").exists()


def test_the_command_that_was_interrupted(qexport, lm, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    words = "qexport: interrupted; nothing was left half-written"
    kept = f"; what was found so far is kept in {tmp_path / '.out.compress'}: "
    # before anything is found, and behind it
    for place, note in (("trials.Trials.measure", "\n"), ("job.refit", kept)):
        with monkeypatch.context() as patched:
            patched.setattr(f"qexport.compression.{place}", stopped)
            code, out, err = qexport("compress", lm, "-o", tmp_path / "out", "-q", "--no-profile")
        assert (code, out) == (130, "")
        assert err.lstrip("\n").startswith(words + note)
        assert [path.name for path in tmp_path.iterdir()] == ([".out.compress"] if note == kept else [])
