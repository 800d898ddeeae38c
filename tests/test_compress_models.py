"""compress on every kind of model: .onnx of all opsets and types, bundles, torch; and what a weight may become in it."""

import shutil

import decomposed
import numpy as np
import onnx
import pytest
import torch
import transformers
from bundle_factory import make_text_bundle
from compression_cases import RUNTIME_OPS, correlated, files, language_model, model_of, ops, random, relative, token_ids
from test_convert_huggingface import TEXT as LLAMA

from qexport import conversion
from qexport.bundle import Bundle
from qexport.compression import compress, job
from qexport.compression.forms import NODE
from qexport.data import load_inputs
from qexport.generation import Generator
from qexport.runtime import run, session


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory):
    return make_text_bundle(tmp_path_factory.mktemp("text") / "bundle", hidden=256)


def test_a_bundle_keeps_its_sampled_attention(text_bundle, tmp_path):
    before = files(text_bundle)
    lines = ["the cat sat", "cat $x_1$ 日本", "</script><b> sat the", "sat sat sat sat"] * 6
    (tmp_path / "texts.txt").write_text("\n".join(lines), encoding="utf-8")
    report = compress(text_bundle, tmp_path / "out", tmp_path / "texts.txt", ratio=2, batch=4, profile=False)
    assert files(text_bundle) == before
    assert report.passed
    assert report.metric["name"] == "cosine"
    assert (report.data["fitted"], report.data["judged"]) == (20, 4)
    out = Bundle.open(tmp_path / "out", verify=True)
    assert ops(out.model_path).count("QuantumAttention") == 2
    assert out.manifest["sites"] == Bundle.open(text_bundle).manifest["sites"]
    assert files(tmp_path / "out")["classical.onnx"] == before["classical.onnx"]
    feed = load_inputs(out, lines[:4]).feeds[0]
    seeded = [run(session(out.path), None, {**feed, "seed": np.array(seed)})[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(seeded[0], seeded[1])
    assert relative(seeded[2], seeded[0]) > 1e-3  # it does sample
    run(session(out.path, library=False), None, {**feed, "seed": np.array(0)})


def test_a_recipe_samples_and_compresses_in_one(lm, tmp_path):
    recipe = {
        "strategy": "stratified",
        "num_samples": 4,
        "compress": {"ratio": 3, "layers": [{"match": "w?", "methods": []}, {"match": "words", "methods": ["int4"]}]},
    }
    report = compress(lm, tmp_path / "out", token_ids(), recipe=recipe, profile=False)
    methods = {layer["name"]: layer["method"] for layer in report.layers}
    assert {methods[f"w{i}"] for i in "qkvo"} == {"as it was"}
    assert methods["words"].startswith(("int4", "as it was"))
    assert ops(tmp_path / "out" / "model.onnx").count("QuantumAttention") == 1


@pytest.mark.parametrize("strategy", [None, "stratified"])
def test_an_older_opset(tmp_path, monkeypatch, strategy):
    """Below opset 23 there is no Attention: what is spelled out stays so, unless it is sampled."""
    for name, value in (("HEAD_SIZE", 32), ("WIDTH", 64), ("VOCAB", 80)):
        monkeypatch.setattr(decomposed, name, value)
    path = decomposed.save(tmp_path, opset=17)
    recipe = {"strategy": strategy, "num_samples": 8} if strategy else None
    report = compress(path, tmp_path / "out", decomposed.feeds(16), ratio=3, opset=17, recipe=recipe, profile=False)
    assert report.passed
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 17
    assert ops(tmp_path / "out" / "model.onnx").count("QuantumAttention") == (2 if strategy else 0)
    run(session(tmp_path / "out", library=False), None, decomposed.feeds(2) | ({"seed": np.array(0)} if strategy else {}))


def test_a_model_of_float16(tmp_path):
    path = language_model(tmp_path / "half.onnx", dtype=np.float16)
    report = compress(path, tmp_path / "out", token_ids(), ratio=3, profile=False)
    assert report.passed
    assert not any(layer["method"] == "fp16" for layer in report.layers)
    assert report.outputs["logits"]["relative_error"] < 0.5
    logits = run(session(tmp_path / "out", library=False), None, token_ids(2))[0]
    assert logits.dtype == np.float16


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_strings_of_a_trellis(tmp_path, monkeypatch, dtype):
    """They lose less than whole numbers at the same size, the runtime makes the weights of them when it loads the file, and
    models too small for their table have none."""
    monkeypatch.setattr(job, "STRINGS_FROM", 0)
    path = language_model(tmp_path / "lm.onnx", dtype=dtype)
    ids = token_ids(40)
    found = {
        methods: compress(path, tmp_path / methods, ids, max_drop=0.01, methods=methods, metric="cosine", profile=False)
        for methods in ("trellis", "int4,int8")
    }
    report = found["trellis"]
    assert report.passed
    assert {layer["method"].split()[0] for layer in report.layers} == {"trellis"}
    strings, numbers = (sum(layer["after"] for layer in r.layers) for r in found.values())
    assert strings - 7 * 3 * NODE < numbers  # three nodes more each, which no real weight would notice
    bundle = Bundle.open(tmp_path / "trellis", verify=True)
    assert not RUNTIME_OPS & set(ops(bundle.model_path))
    monkeypatch.undo()
    report = compress(path, tmp_path / "small", ids, ratio=2, methods="trellis", profile=False)
    assert {layer["method"] for layer in report.layers} == {"as it was"}


def test_a_structured_weight_becomes_a_train(tmp_path):
    """A Kronecker product is a train of bond dimension 1; nothing else of its error is as small."""
    small = [np.random.default_rng(i).standard_normal((2, 2)) / 2**0.5 for i in range(6)]
    kron = small[0]
    for factor in small[1:]:
        kron = np.kron(kron, factor)
    path = language_model(tmp_path / "lm.onnx", wo=lambda array: kron)
    layers = [{"match": name, "methods": []} for name in ("words", "w[qkv]", "up", "down")]
    report = compress(
        path, tmp_path / "out", token_ids(), ratio=1.15, recipe={"compress": {"layers": layers}}, profile=False
    )
    found = {layer["name"]: layer for layer in report.layers}["wo"]
    assert found["method"].startswith("mpo")
    assert found["relative_error"] < 1e-3
    bundle, feed = Bundle.open(tmp_path / "out"), token_ids()
    assert "MPOLinear" in ops(bundle.model_path)
    expected = run(session(bundle.classical_path, library=False), ["logits"], feed)[0]
    for library in (False, True):
        assert relative(run(session(bundle.model_path, library=library), ["logits"], feed)[0], expected) < 1e-3


def test_an_output_of_whole_numbers(tmp_path):
    model = model_of(
        """<ir_version: 10, opset_import: ["": 23]> g (float[batch,64] x) => (float[batch,96] y, int64[batch,1] best) {
        y = MatMul(x, w) best = ArgMax<axis=1>(y) }""",
        {"w": random(64, 96)},
    )
    onnx.save(model, tmp_path / "model.onnx")
    report = compress(tmp_path / "model.onnx", tmp_path / "out", {"x": correlated(64, 64)}, ratio=3, profile=False)
    assert report.passed
    assert set(report.outputs) == {"y", "best"}


def test_files_that_are_not_of_the_bundle_stay_behind(text_bundle, tmp_path):
    """Its tokenizer is of it, even where it was put there by hand."""
    before = set(files(text_bundle))
    copied = shutil.copytree(text_bundle, tmp_path / "bundle")
    (copied / "notes.txt").write_text("mine")
    (copied / "checkpoints").mkdir()
    (copied / "checkpoints" / "weights.bin").write_bytes(bytes(100))
    compress(copied, tmp_path / "out", None, ratio=1.5, methods=["int8"], profile=False)
    assert set(files(tmp_path / "out")) == before
    assert "tokenizer/tokenizer.json" in before - set(Bundle.open(text_bundle).manifest["files"])
    assert (copied / "notes.txt").read_text() == "mine"


def test_a_torch_model(tmp_path):
    x = torch.randn(24, 6, 64, generator=torch.Generator().manual_seed(1)).numpy()
    np.savez(tmp_path / "data.npz", src=x)
    report = compress("torch_zoo:wide_layer", tmp_path / "out", tmp_path / "data.npz", max_drop=0.001, profile=False)
    assert report.passed
    assert report.size["ratio"] > 3
    assert {layer["module"] for layer in report.layers} >= {"linear1", "linear2"}
    import torch_zoo

    module = torch_zoo.wide_layer()[0].eval()
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    found = run(session(tmp_path / "out", library=False), None, {"src": x})[0]
    assert 0 < relative(found, expected) < 0.1


def test_a_bundle_with_a_kv_cache_goes_on_generating(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA | {"num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96})
    transformers.LlamaForCausalLM(config).eval().save_pretrained(tmp_path / "llama")
    conversion.convert(tmp_path / "llama", tmp_path / "bundle", kv_cache=48, strategy="exact")
    ids = np.random.default_rng(0).integers(0, 99, (16, 12))
    report = compress(tmp_path / "bundle", tmp_path / "out", {"input_ids": ids}, methods=["int8", "fp16"], profile=False)
    assert report.passed
    assert report.size["ratio"] > 2
    prompt = [[5, 6, 7, 8, 9]]
    before, after = (Generator(tmp_path / name).generate(prompt, max_new_tokens=4) for name in ("bundle", "out"))
    assert len(after[0]) == len(before[0]) == 4
    assert report.outputs["logits"]["relative_error"] < 0.1


def test_a_bundle_with_noise(lm, tmp_path):
    conversion.convert(lm, tmp_path / "bundle", noise="depolarizing:0.01", shots="inf")
    report = compress(tmp_path / "bundle", tmp_path / "out", token_ids(), ratio=3, profile=False)
    assert report.passed
    assert "QuantumNoise" in ops(tmp_path / "out" / "model.onnx")
    assert Bundle.open(tmp_path / "out").manifest["sites"][0]["noise"] == "depolarizing:0.01"


@pytest.mark.parametrize("ratio", [5, 6.3])  # the first file is too large: what is written next takes its place
def test_a_model_beyond_one_protobuf(lm, tmp_path, monkeypatch, ratio):
    whole = compress(lm, tmp_path / "whole", token_ids(), ratio=ratio, profile=False)
    monkeypatch.setattr(conversion, "EXTERNAL_ABOVE", 10_000)
    conversion.convert(lm, tmp_path / "bundle", strategy="exact")
    assert (tmp_path / "bundle" / "model.onnx.data").is_file()
    for source in (lm, tmp_path / "bundle"):
        report = compress(source, tmp_path / "out", token_ids(), ratio=ratio, profile=False)
        assert report.passed
        names = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
        weights = [name for name in names if name.endswith(".data") and name != "model.onnx.data"]
        assert report.size["after"] == names["model.onnx"] + sum(names[name] for name in weights)
        tensors = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.initializer
        assert all(len(tensor.raw_data) <= conversion.SMALLEST_EXTERNAL for tensor in tensors)
        assert report.size["before"] == names["classical.onnx"] + names["model.onnx.data"]
        run(session(tmp_path / "out", library=False), None, token_ids(2))
    assert abs(report.size["after"] / whole.size["after"] - 1) < 0.1
