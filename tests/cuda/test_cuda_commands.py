"""Commands and functions that run a bundle, on onnxruntime's CUDA provider."""

import json

import numpy as np
import onnxruntime
import pytest
from bundle_factory import make_text_bundle

import qexport
from qexport.validation.limits import ROUNDING

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]
CUDA = "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, gpu):
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    return make_text_bundle(tmp_path_factory.mktemp("commands") / "bundle")


def judged_validation(found):
    assert found["passed"], found["reasons"]
    assert all(metrics["relative_error"] < ROUNDING["float16"] for metrics in found["outputs"]["fallback"].values())
    assert found["max_error"]["fallback"] >= ROUNDING["float16"]


def judged_profile(found):
    for model in found["sizes"][0]["models"].values():
        assert model["placement"]["nodes"][CUDA] > 0
        assert model["latency_ms"]["p50"] > 0
    converted = found["sizes"][0]["models"]["converted"]["ops"]
    assert [op["provider"] for op in converted if op["op"] == "QuantumAttention"] == [CUDA]


def judged_tuning(found):
    assert found["passed"], found["reasons"]
    assert all(one["time_us"] > 0 for site in found["sites"] for one in site["measured"])
    assert found["best"]["ratio"]["of_medians"] > 0


def judged_resilience(found):
    clean = [cell for cell in found["cells"] if cell["level"] == 0 and cell["shots"] == "inf"]
    assert [cell["attention_error"]["mean"] < ROUNDING["float16"] for cell in clean] == [True]
    noisy = [cell for cell in found["cells"] if cell["level"] == 0.1 and cell["shots"] == "inf"]
    assert noisy[0]["attention_error"]["mean"] > clean[0]["attention_error"]["mean"]


def judged_scaling(found):
    rows = {one["name"]: one["lengths"] for one in found["contenders"]}
    assert set(rows) >= {"exact fp32", "stratified 32", "MultiHeadAttention", "SDPA", "uniform 1/8"}
    for name in ("exact fp32", "MultiHeadAttention", "SDPA"):
        assert max(row["error_worst"] for row in rows[name]) < ROUNDING["float16"], name
    assert all(row["memory_bytes"] is None for lengths in rows.values() for row in lengths)


def judged_attention(found):
    assert all(np.isfinite(site["own_error"]).all() for item in found["items"] for site in item["sites"])
    assert len(found["files"]) == 1


def judged_report(found):
    assert set(found["parts"]) >= {"validate", "profile", "samples"}
    assert {found["parts"][name]["settings"]["providers"][0] for name in ("validate", "profile", "samples")} == {CUDA}


COMMANDS = [
    (judged_validation, ["validate", "DIR", "--seeds", 5, "--max-error", "500%"]),
    (judged_profile, ["profile", "DIR", "--seq", 16, "--runs", 5]),
    (judged_tuning, ["tune", "DIR", "--max-error", "90%", "--trials", 4, "--seeds", 1]),
    (judged_resilience, ["resilience", "DIR", "--levels", "0.1", "--shots", "64,inf", "--seeds", 2]),
    (
        judged_scaling,
        ["scaling", "--lengths", "128,256", "--strategies", "exact,stratified,MultiHeadAttention,SDPA,top-k,uniform"],
    ),
    (judged_attention, ["attention", "DIR", "--text", "the cat sat", "--no-pictures", "-o", "OUT"]),
    (
        judged_report,
        ["report", "DIR", "-o", "OUT.html", "--seq", 16, "--runs", 5, "--max-error", "500%", "--skip", "scaling"],
    ),
]


@pytest.mark.parametrize(("judge", "words"), COMMANDS, ids=[words[0] for _, words in COMMANDS])
def test_command(judge, words, bundle, qexport, tmp_path):
    places = {"DIR": bundle, "OUT": tmp_path / "out", "OUT.html": tmp_path / "out.html"}
    code, out, err = qexport(*(places.get(word, word) for word in words), "--provider", "cuda", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["settings"]["providers"] == [CUDA]
    judge(found)


def test_generating_keeps_the_caches_on_the_device(gpu, tmp_path):
    """A prompt and steps behind it: the logits of the CPU, to rounding."""
    pytest.importorskip("transformers")
    qexport.convert("tests.torch_zoo:decoder", tmp_path / "b", kv_cache=60, strategy="exact")
    on = {name: qexport.Generator(tmp_path / "b", providers=[name]) for name in ("cuda", "cpu")}
    prompt = (np.arange(30) * 7 % 40 + 1).tolist()
    for tokens in ([prompt], [[3]], [[4]]):
        found, want = (on[name].append(tokens) for name in ("cuda", "cpu"))
        np.testing.assert_allclose(found, want, atol=ROUNDING["float16"] * np.abs(want).max())
    assert {value.device_name() for value in on["cuda"].caches.values()} == {"cuda"}
    assert {value.device_name() for value in on["cpu"].caches.values()} == {"cpu"}
