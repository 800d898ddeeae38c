"""convert with kv_cache: a decoder that appends to its caches says what it says without one, whatever the past."""

import json
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from test_convert_huggingface import TEXT
from test_library import runtime_folder

import qexport
from qexport.bundle import Bundle
from qexport.conversion import convert
from qexport.data import load_inputs, stored_samples
from qexport.errors import QexportError, UsageError
from qexport.generated import generate
from qexport.generation import Generator
from qexport.kv_cache import MIN_ONNXRUNTIME
from qexport.profiling import calls
from qexport.sources.opening import open_source

LENGTH = 48
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22]]
# Grouped heads; windows of 6 keys and a soft cap in every other layer; a window in all of them; sinks, with a window in the
# first layer; learned positions.
MODELS = {
    "Llama": TEXT | {"num_key_value_heads": 2},
    "Gemma2": TEXT | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
    "Mistral": TEXT | {"num_key_value_heads": 2, "sliding_window": 5},
    "GptOss": TEXT
    | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "intermediate_size": 32, "num_local_experts": 4}
    | {"num_experts_per_tok": 2},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64, "eos_token_id": 2},
}


def random_model(name, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name] | changes)
    model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).eval()
    for parameter, weights in model.named_parameters():
        if parameter.endswith("sinks"):  # begin at next to nothing
            torch.nn.init.normal_(weights)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(model, folder of the model, folder of its bundle with exact attention) by name; made once."""
    root, done = tmp_path_factory.mktemp("decoders"), {}

    def make(name):
        if name not in done:
            model = random_model(name)
            model.save_pretrained(root / name)
            convert(root / name, root / f"{name}_bundle", kv_cache=LENGTH, strategy="exact")
            done[name] = model, root / name, root / f"{name}_bundle"
        return done[name]

    return make


def export(folder, path):
    """The classical model of a folder without a cache, as any exporter could have written it; the path of the file."""
    ir.save(open_source(folder, opset=24, positions=True).model, path)
    return path


def logits_of(model, ids) -> np.ndarray:
    """Logits (tokens, vocabulary) of one text, without a cache."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()


def greedy(model, prompt, count) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_texts_of_different_lengths_go_on_as_without_a_cache(made, name):
    """Two texts in one batch, over the window's edge, with the op library and without it."""
    model, _, bundle = made(name)
    expected = [greedy(model, prompt, 30) for prompt in PROMPTS]
    for library in (True, False):
        assert Generator(bundle, library=library).generate(PROMPTS, max_new_tokens=30, stop=[]) == expected, library


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_pieces_is_the_prompt_in_one(made, name, monkeypatch):
    model, _, bundle = made(name)
    text = np.random.default_rng(1).integers(3, 99, 40).tolist()
    expected = logits_of(model, text)[-1]
    generator = Generator(bundle)
    whole = generator.append([text])[0]
    generator.reset()
    generator.append([text[:23]])
    pieces = generator.append([text[23:]])[0]
    generator.reset()
    monkeypatch.setattr("qexport.generation.PIECE", 7)
    small = generator.append([text])[0]
    assert generator.past.tolist() == [40]
    for got in (whole, pieces, small):
        assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()


def test_rows_of_a_batch_do_not_see_each_other(made):
    """Rows that are filled up to the longest, over several appends, give the logits that each has alone."""
    model, _, bundle = made("Llama")
    generator, rng = Generator(bundle), np.random.default_rng(2)
    generator.reset(3)
    texts = [[], [], []]
    for counts in ((9, 1, 4), (1, 1, 1), (2, 15, 7), (1, 1, 1)):
        pieces = [rng.integers(3, 99, count).tolist() for count in counts]
        got = generator.append(pieces)
        for row, piece in enumerate(pieces):
            texts[row] += piece
            expected = logits_of(model, texts[row])[-1]
            assert np.abs(got[row] - expected).max() < 1e-5 * np.abs(expected).max()
    assert generator.past.tolist() == [13, 18, 13]


def test_the_stored_sample_has_pasts_of_different_lengths_and_the_logits_of_the_source(made):
    folder = made("Llama")[2]
    bundle = Bundle.open(folder, verify=True)
    inputs = stored_samples(bundle)
    (feed,), (outputs,) = inputs.feeds, inputs.expected
    assert feed["past_len"].tolist() == [36, 34]
    assert feed["input_ids"].shape == (2, 12)
    assert all(np.abs(feed[past][0, :, :36]).min() > 0 for past, _ in bundle.manifest["kv_cache"]["caches"])
    assert bundle.manifest["metrics"]["max_difference_to_source"] < 1e-5
    # the first piece of the text is the one that was drawn for the conversion: see it in the caches only
    session = qexport.session(folder)
    got = session.run(["logits"], feed)[0]
    assert np.abs(got - outputs["logits"]).max() < 1e-5 * np.abs(outputs["logits"]).max()


def test_the_manifest_says_what_a_runtime_needs(made):
    manifest = Bundle.open(made("Gemma2")[2]).manifest
    cache = manifest["kv_cache"]
    assert (cache["length"], cache["past_length"], cache["logits"]) == (LENGTH, "past_len", "logits")
    assert cache["stop_tokens"] == [2]
    assert cache["caches"][3] == ["past_key_values.1.value", "present.1.value"]
    specs = {spec["name"]: spec for spec in manifest["inputs"]}
    assert specs["past_key_values.0.key"]["shape"] == ["batch", 2, LENGTH, 8]
    assert manifest["limits"] == {"sequence": LENGTH}
    assert (manifest["opset"], manifest["min_onnxruntime"]) == (24, "1.28")


def test_validate_and_profile_take_such_a_bundle(made):
    report = qexport.validate(made("Llama")[2], seeds=1)
    assert report.passed, report.reasons
    entry = qexport.profile(made("Llama")[2], seq=1, runs=2, warmup=1).sizes[0]
    assert entry["dims"] == {"batch": 1, "sequence": 1}


def test_a_timed_step_has_its_caches_in_place_and_can_be_run_again(made, monkeypatch):
    bundle = Bundle.open(made("Llama")[2])
    opened, feed = qexport.session(bundle.model_path), stored_samples(bundle).feeds[0]
    before = {name: array.copy() for name, array in feed.items()}
    expected = opened.run(None, feed)
    bindings = []
    monkeypatch.setattr(calls.runtime, "run_bound", lambda session, binding: bindings.append(binding))
    call = calls.make_call(opened, feed, calls.shared_buffers(bundle.manifest))
    for _ in range(2):
        call()
        opened.run_with_iobinding(bindings[-1])
        found = dict(zip([value.name for value in opened.get_outputs()], bindings[-1].get_outputs(), strict=True))
        for value, array in zip(found.values(), expected, strict=True):
            np.testing.assert_allclose(value.numpy(), array, rtol=1e-6, atol=1e-6)
        for past, present in bundle.manifest["kv_cache"]["caches"]:
            assert found[present].data_ptr() == call.values[past].data_ptr()
    for name, array in feed.items():
        np.testing.assert_array_equal(array, before[name])


def test_generated_inputs_fill_the_cache_up(made):
    bundle = Bundle.open(made("Llama")[2])
    feed = generate(bundle, batch=2, seq=5).feeds[0]
    assert feed["past_len"].tolist() == [LENGTH - 5] * 2
    assert feed["past_key_values.1.key"].shape == (2, 2, LENGTH, 8)


def test_missing_caches_are_empty_and_too_many_tokens_one_line(made):
    bundle = Bundle.open(made("Llama")[2])
    inputs = load_inputs(bundle, {"input_ids": np.full((2, 6), 7)})
    assert not inputs.feeds[0]["past_len"].any()
    assert inputs.notes == [
        f"{what} was not given and is filled with zeros" for what in ("input 'past_len'", "the KV cache")
    ]
    with pytest.raises(QexportError, match="6 tokens behind a past of 43 do not fit into the cache of 48") as error:
        load_inputs(bundle, {"input_ids": np.full((2, 6), 7), "past_len": np.array([43, 0])})
    assert "\n" not in str(error.value)


def test_float16(made, tmp_path):
    model, folder, _ = made("Llama")
    convert(folder, tmp_path / "b", kv_cache=LENGTH, dtype="float16", strategy="exact")
    generator = Generator(tmp_path / "b")
    assert generator.caches["past_key_values.0.key"].numpy().dtype == np.float16
    text = np.random.default_rng(1).integers(3, 99, 40).tolist()
    generator.append([text[:20]])
    got, expected = generator.append([text[20:]])[0], logits_of(model, text)[-1]
    assert np.abs(got - expected).max() < 1e-2 * np.abs(expected).max()


def test_bfloat16_is_converted_and_not_run(made, tmp_path):
    """onnxruntime has no bfloat16 kernels for the rest of the model on the CPU."""
    report = convert(made("Llama")[1], tmp_path / "b", kv_cache=LENGTH, dtype="bfloat16", strategy="exact")
    assert "cannot run bfloat16" in report.notes[0]
    with pytest.raises(QexportError, match="its caches are bfloat16, which numpy does not have; convert with"):
        Generator(tmp_path / "b")


def test_an_onnx_file_with_position_ids(made, tmp_path):
    """No torch on the way."""
    model, folder, _ = made("Mistral")
    report = convert(export(folder, tmp_path / "decoder.onnx"), tmp_path / "b", kv_cache=LENGTH, strategy="exact")
    assert report.max_difference < 1e-5
    got = Generator(tmp_path / "b").generate(PROMPTS, max_new_tokens=20, stop=[])
    assert got == [greedy(model, prompt, 20) for prompt in PROMPTS]


def test_a_callable(tmp_path):
    report = convert("tests.torch_zoo:decoder", tmp_path / "b", kv_cache=40, strategy="exact")
    assert (len(report.sites), report.left_alone) == (2, [])
    assert report.max_difference < 1e-5


def test_a_dry_run_finds_the_sites(made):
    report = convert(made("Llama")[1], None, kv_cache=LENGTH, dry_run=True)
    assert (len(report.sites), report.path) == (2, None)


@pytest.mark.parametrize(
    ("model", "options", "kind", "words"),
    [
        ("tests.torch_zoo:decoder_that_counts", {}, QexportError, "differs from the source"),
        ("tests.torch_zoo:decoder_that_looks_ahead", {}, QexportError, "cannot have a KV cache: it is not causal"),
        ("tests.torch_zoo:encoder", {}, QexportError, "token ids and position ids, both (batch, sequence); it has"),
        ("tests.torch_zoo:decoder", {"kv_cache": 65}, UsageError, "kv_cache must be at most 64"),
        ("tests.torch_zoo:decoder", {"kv_cache": 1}, UsageError, "kv_cache must be >= 2, got 1"),
        ("tests.torch_zoo:decoder", {"opset": 23}, UsageError, "a KV cache needs opset 24, got 23; leave opset out"),
    ],
)
def test_what_cannot_have_a_cache(model, options, kind, words, tmp_path):
    with pytest.raises(kind) as error:
        convert(model, tmp_path / "b", **{"kv_cache": LENGTH} | options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "b").exists()


def test_folders_that_cannot_have_a_cache(made, tmp_path):
    folder = made("Llama")[1]
    with pytest.raises(UsageError, match="needs task causal-lm, got 'feature-extraction'"):
        convert(folder, tmp_path / "b", kv_cache=LENGTH, task="feature-extraction")
    bloom = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}
    transformers.BloomForCausalLM(transformers.BloomConfig(**bloom)).save_pretrained(tmp_path / "bloom")
    with pytest.raises(QexportError, match="BloomForCausalLM takes no position ids"):
        convert(tmp_path / "bloom", tmp_path / "b", kv_cache=LENGTH)


RUN = """
import sys, json, qexport.generation
from qexport.bundle import Bundle
generator = qexport.generation.Generator(sys.argv[1], library=False)
print(json.dumps(generator.generate(json.loads(sys.argv[2]), max_new_tokens=20, stop=[])))
"""


@pytest.mark.registry
def test_the_oldest_runtime_that_the_manifest_names_generates_the_same(made):
    model, _, bundle = made("Mistral")
    oldest = ".".join(map(str, MIN_ONNXRUNTIME)) + ".0"
    path = [str(runtime_folder(oldest)), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}\n{RUN}", str(bundle), json.dumps(PROMPTS)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [greedy(model, prompt, 20) for prompt in PROMPTS]
