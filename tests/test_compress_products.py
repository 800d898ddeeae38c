"""compress with products of whole numbers, end to end: figures, goals, stopped runs, sampled attention, healing, words."""

import json

import numpy as np
import onnx
import pytest
from bundle_factory import make_bundle
from compression_cases import RUNTIME_OPS, language_model, ops, relative, token_ids
from onnx import numpy_helper

from qexport.bundle import Bundle, sha256
from qexport.compression import compress, job
from qexport.compression.decoding import TOP
from qexport.errors import QexportError
from qexport.runtime import run, session

OPTIONS = {"products": "int8", "metric": "cosine", "profile": False}


def test_a_file_with_products_of_whole_numbers(lm, tmp_path):
    ids = token_ids(40)
    report = compress(lm, tmp_path / "out", ids, ratio=4, **OPTIONS)
    assert report.passed
    assert report.size["ratio"] >= 4
    assert "products of 7 of 7 weights are of whole numbers" in report.notes
    assert all(layer["int8_products"] for layer in report.layers)
    assert {layer["method"].split()[0] for layer in report.layers} <= {"int8", "int4", "fp16", "as"}
    bundle = Bundle.open(tmp_path / "out", verify=True)
    assert all(layer["int8_products"] for layer in bundle.manifest["compression"]["layers"])
    kinds = ops(bundle.model_path)
    # one input of q, k and v is rounded once
    assert (kinds.count("MatMulInteger"), kinds.count("DynamicQuantizeLinear")) == (7, 5)
    assert not {"MatMul", "MatMulNBits"} & set(kinds)
    # what is said of it is what the file does
    judged = {"input_ids": ids["input_ids"][24:32]}
    classical, compressed = (run(session(p, library=False), None, judged)[0] for p in (bundle.classical_path, bundle.path))
    assert report.metric["error"] == pytest.approx(relative(compressed, classical), rel=1e-3)


def test_errors_of_weights_are_those_of_what_products_multiply_with(lm, tmp_path):
    """A weight that stays as it was is rounded to 7 bits for its product; its inputs are not part of its error."""
    report = compress(lm, tmp_path / "out", token_ids(40), ratio=1.0001, methods=[], **OPTIONS)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(lm).graph.initializer}
    for layer in report.layers:
        assert layer["method"] == "as it was"
        np.testing.assert_array_equal(stored[layer["name"]], before[layer["name"]])
        assert 1e-3 < layer["relative_error"] < 2 / TOP
    assert not report.passed  # there is nothing to make it smaller
    kept = compress(lm, tmp_path / "kept", token_ids(40), ratio=1.0001, methods=[], profile=False)
    assert not any(layer["relative_error"] for layer in kept.layers)
    assert not any(layer["int8_products"] for layer in kept.layers)


def test_a_drop_bounds_products_and_weights_together(lm, tmp_path):
    counts, sizes = [], []
    for drop in (2e-5, 1e-3, 1e-2):
        report = compress(lm, tmp_path / "out", token_ids(), max_drop=drop, **OPTIONS)
        assert report.passed
        assert report.metric["loss"] <= drop
        counts.append(sum(layer["int8_products"] for layer in report.layers))
        sizes.append(report.size["after"])
    assert counts[0] < counts[1] == counts[2] == 7
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_ratio_and_a_drop(lm, tmp_path):
    report = compress(lm, tmp_path / "out", token_ids(), ratio=3, max_drop=0.01, **OPTIONS)
    assert report.passed
    assert report.size["ratio"] >= 3
    assert report.metric["loss"] <= 0.01
    report = compress(lm, tmp_path / "out", token_ids(), ratio=6, max_drop=1e-4, **OPTIONS)
    assert not report.passed
    reason = f"cosine loses {report.metric['loss']:.3g} in the file, above max_drop 0.0001; ask for a smaller ratio"
    assert reason in report.reasons


def test_strings_under_products_of_whole_numbers(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "STRINGS_FROM", 0)
    report = compress(lm, tmp_path / "out", token_ids(40), max_drop=0.01, methods="trellis,low-rank,mpo", **OPTIONS)
    assert report.passed
    # factors multiply whole numbers in fewer steps themselves, trains need no matrix: neither is mixed with this
    assert {layer["method"].split()[0] for layer in report.layers} == {"trellis"}
    bundle = Bundle.open(tmp_path / "out")
    assert not RUNTIME_OPS & set(ops(bundle.model_path))
    assert bundle.manifest["min_onnxruntime"] == Bundle.open(make_plain(lm, tmp_path)).manifest["min_onnxruntime"]


def make_plain(lm, folder):
    compress(lm, folder / "plain", token_ids(), ratio=1.5, methods=["fp16"], profile=False)
    return folder / "plain"


def test_a_stopped_run_goes_on(lm, tmp_path):
    options = {"max_drop": 1e-3, **OPTIONS}
    wanted = compress(lm, tmp_path / "wanted", token_ids(), **options)
    for start in ("rounding", "trying products", "trying weights"):
        seen = []

        def stop(step, _, start=start, seen=seen):
            seen.append(step)
            if step.startswith(start):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compress(lm, tmp_path / "out", token_ids(), progress=stop, **options)
        report = compress(lm, tmp_path / "out", token_ids(), **options)
        assert "took up what another run had found" in report.notes
        assert sha256(tmp_path / "out" / "model.onnx") == sha256(tmp_path / "wanted" / "model.onnx")
        assert report.layers == wanted.layers


def test_findings_serve_both_kinds_of_products(lm, tmp_path):
    """What a weight costs in each form is the same for both; what becomes of the model is not."""
    alone = {}
    for products in ("float", "int8"):
        options = OPTIONS | {"products": products, "ratio": 5}
        alone[products] = compress(lm, tmp_path / f"alone {products}", token_ids(), **options)
    for products in ("float", "int8", "float"):
        steps, options = [], OPTIONS | {"products": products, "ratio": 5, "findings": tmp_path / "findings"}
        report = compress(lm, tmp_path / "out", token_ids(), progress=lambda step, _, s=steps: s.append(step), **options)
        assert report.layers == alone[products].layers
        assert report.metric == alone[products].metric
    assert not any("watching" in step for step in steps)


def test_sampled_attention_beside_it(lm, tmp_path):
    recipe = {"strategy": "stratified", "num_samples": 4, "compress": {"ratio": 2, "products": "int8"}}
    report = compress(lm, tmp_path / "out", token_ids(), recipe=recipe, profile=False)
    kinds = ops(tmp_path / "out" / "model.onnx")
    assert kinds.count("QuantumAttention") == 1
    assert kinds.count("MatMulInteger") == sum(layer["int8_products"] for layer in report.layers)
    feed = {**token_ids(2), "seed": np.array(0)}
    found = [run(session(tmp_path / "out", library=library), None, feed)[0] for library in (False, True)]
    assert np.isfinite(found).all()


def test_a_bundle_whose_inputs_are_padded(tmp_path):
    make_bundle(tmp_path / "bundle", hidden=256)
    ids = np.random.default_rng(0).integers(0, 50, (16, 9))
    report = compress(tmp_path / "bundle", tmp_path / "out", {"input_ids": ids}, ratio=1.5, **OPTIONS)
    assert report.passed
    assert any(layer["int8_products"] for layer in report.layers)


def test_models_of_float16_are_left_in_float(tmp_path):
    path = language_model(tmp_path / "half.onnx", dtype=np.float16)
    report = compress(path, tmp_path / "out", token_ids(), ratio=2, **OPTIONS)
    assert not any(layer["int8_products"] for layer in report.layers)
    assert any(note.startswith("products of 0 of 7 weights are of whole numbers; the others") for note in report.notes)


def test_healing_beside_it(tmp_path):
    options = OPTIONS | {"methods": "int4", "ratio": 2, "heal": 3}
    x = np.random.default_rng(0).standard_normal((24, 6, 64)).astype(np.float32)
    report = compress("torch_zoo:wide_layer", tmp_path / "out", {"src": x}, **options)
    assert any(layer["int8_products"] and layer["method"].startswith("int4") for layer in report.layers)
    assert 0 < report.metric["loss"] < 0.05


def test_a_loss_that_is_there_before_is_told_at_once(tmp_path):
    make_bundle(tmp_path / "bundle", hidden=256)
    with pytest.raises(QexportError, match=r"loses .* with all weights as they were, above max_drop 1e-06"):
        compress(tmp_path / "bundle", tmp_path / "out", None, ratio=2, max_drop=1e-6, **OPTIONS)


def test_the_command_and_what_it_prints(lm, tmp_path, qexport):
    np.savez(tmp_path / "ids.npz", **token_ids())
    base = ["compress", lm, "-o", tmp_path / "out", "--data", tmp_path / "ids.npz", "--no-profile"]
    code, out, _ = qexport(*base, "--ratio", 4, "--products", "int8", "--metric", "cosine", "-v")
    assert code == 0
    assert "products of 7 of 7 weights are of whole numbers" in out
    weights = [line.split("  ") for line in out.splitlines() if " x 64 " in line or " x 160 " in line]
    assert ["int8" in (cell.strip() for cell in line) for line in weights] == [True] * 7
    assert "products of 7 in int8" in qexport("inspect", tmp_path / "out")[1]
    code, out, _ = qexport(*base, "--ratio", 2, "--json")
    assert not any(layer["int8_products"] for layer in json.loads(out)["layers"])
    code, _, err = qexport(*base, "--products", "int4")
    assert code == 2
    assert "'int4' is not one of 'float', 'int8'" in err
