"""Bundles with noise: convert, inspect, validate, attention, tune and the command line."""

import json

import numpy as np
import pytest
from decomposed import feeds, save

import qexport
from qexport.cli import main
from qexport.errors import QexportError, UsageError
from qexport.ops import QUANTUM_NOISE

NOISE = "depolarizing:0.02,readout:0.01"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("noisy")


@pytest.fixture(scope="module")
def source(folder):
    return save(folder)


@pytest.fixture(scope="module", params=[17, 23])
def bundle(request, folder, source):
    """A bundle with noise in both attentions, at an opset without and one with Attention."""
    path = folder / f"opset_{request.param}"
    qexport.convert(source, path, noise=NOISE, shots=64, opset=request.param)
    return path


@pytest.fixture
def command(capsys):
    def call(*words):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        return stop.value.code, *capsys.readouterr()

    return call


def hidden(session, **more):
    return session.run(["hidden"], {**feeds(), **more})[0]


def test_scale_and_seed_are_inputs(bundle):
    classical = hidden(qexport.session(bundle / "classical.onnx", library=False))
    noisy = qexport.session(bundle)
    first = hidden(noisy)
    np.testing.assert_array_equal(first, hidden(noisy, seed=np.array(0), noise_scale=np.array(1, np.float32)))
    assert np.abs(first - hidden(noisy, seed=np.array(1))).max() > 1e-3
    errors = [np.abs(hidden(noisy, noise_scale=np.array(x, np.float32)) - classical).mean() for x in (0, 1, 20)]
    assert errors == sorted(errors)
    np.testing.assert_allclose(hidden(qexport.session(bundle, library=False)), classical, atol=1e-5)


def test_infinite_shots_without_noise_are_the_classical_model(folder, source):
    qexport.convert(source, folder / "still", noise="depolarizing:0.02", shots="inf")
    still = qexport.session(folder / "still")
    classical = hidden(qexport.session(folder / "still" / "classical.onnx", library=False))
    np.testing.assert_allclose(hidden(still, noise_scale=np.array(0, np.float32)), classical, atol=1e-5)
    assert np.abs(hidden(still) - classical).max() > 1e-3


def test_the_manifest_says_so_and_brings_the_recipe_back(bundle, folder, source):
    manifest = qexport.inspect(bundle)
    recipe = manifest["recipe"]
    assert (recipe["noise"], recipe["shots"]) == (NOISE, 64)
    again = qexport.convert(source, folder / "again", recipe=recipe, opset=manifest["opsets"]["ai.onnx"], dry_run=True)
    assert [(site["noise"], site["shots"]) for site in again.sites] == [(NOISE, 64)] * 2
    assert [entry["op"].split(":")[1] for entry in manifest["noise"]] == 2 * [
        "QuantumNoise",
        "QuantumNoise",
        "QuantumMeasure",
    ]
    assert manifest["fallbacks"]["com.qexport:QuantumNoise"] == QUANTUM_NOISE.fallback
    stored = json.loads((bundle / "manifest.json").read_text())
    assert stored["noise"] == {"scale_input": "noise_scale", "sites": 2, "without_library": "no noise, no measurement"}
    assert stored["seed_input"] == "seed"


def test_a_recipe_in_yaml(folder, source, command):
    recipe = folder / "recipe.yaml"
    recipe.write_text("noise: bit_flip:0.05\nshots: .inf\nlayers:\n  - match: '*layer.1*'\n    strategy: exact\n")
    code, out, err = command("convert", source, "--config", recipe, "--dry-run")
    assert (code, err) == (0, "")
    assert "1 x bit_flip:0.05, inf shots, 2 heads of 8: encoder.layer.0.self" in out
    assert "1 x exact, 2 heads of 8: encoder.layer.1.self" in out


def test_validate_judges_the_fallback_alone(bundle, command):
    report = qexport.validate(bundle, seeds=4)
    assert report.passed
    first, second = report.sites
    assert (first["noise"], first["shots"]) == (NOISE, 64)
    # the first attention sees the classical values either way; what the second one sees is noisy
    assert first["local"]["relative_error"] == pytest.approx(first["propagated"]["relative_error"], rel=1e-3)
    assert 0.01 < second["local"]["relative_error"] < second["propagated"]["relative_error"]
    assert report.outputs["fallback"]["hidden"]["relative_error"] < 1e-5
    assert report.max_error["library"] == float("inf")
    assert report.to_dict()["max_error"]["library"] is None
    code, out, _ = command("validate", bundle)
    assert code == 0
    assert "without the library there is no noise and no measurement" in " ".join(out.split())
    assert "PASSED without the library, within 0.001 %; what the noise does is above" in out
    code, out, _ = command("validate", bundle, "--max-error", "0.1%")
    assert code == 3


def test_inspect_says_what_a_run_without_the_library_leaves_out(bundle, command):
    code, out, _ = command("inspect", bundle)
    assert code == 0
    assert "without the op library this model has no noise and no measurement: it is the classical one" in out
    assert "QuantumNoise: Identity: no noise, leak 0" in out


def test_maps_see_the_noise(bundle):
    (item,) = qexport.map_attention(bundle, {name: array[:1] for name, array in feeds().items()}).items
    assert all((site.own_error > 0.01).all() for site in item)
    assert all(np.allclose(site.classical.sum(-1), 1, atol=1e-5) for site in item)


def test_tune_refuses(bundle):
    with pytest.raises(QexportError, match="its attention is noisy, which no recipe mends; convert it without noise"):
        qexport.tune(bundle, max_error=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--noise", "depolarizing:2"), "level must be in 0 to 1.33333"),
        (("--noise", "thermal_relaxation:1:T1=1:T2=3"), "T2 must be at most 2 T1 = 2, got 3"),
        (("--noise", "bit_flip:0.1", "--strategy", "tree"), "noise acts on exact probabilities; leave strategy out"),
        (("--noise", "bit_flip:0.1", "--num-samples", "8"), "leave num_samples out, got (8,) beside noise"),
        (("--noise", "bit_flip:0.1", "--shots", "0"), "shots: must be a whole number from 1 to 2147483647, or inf"),
        (("--shots", "8"), "shots 8 need noise"),
        (("--noise", "bit_flip:0.1", "--kv-cache", "64"), "noise and kv_cache exclude each other"),
    ],
)
def test_the_command_line_refuses_in_one_line(source, folder, command, words, message):
    code, out, err = command("convert", source, "-o", folder / "never", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("qexport: error: ")
    assert message in err
    assert not (folder / "never").exists()


def test_a_wrong_number_of_shots_on_the_command_line(source, command):
    code, _, err = command("convert", source, "--dry-run", "--noise", "bit_flip:0.1", "--shots", "few")
    assert code == 2
    assert "'few' is not a whole number or inf" in err


def test_scales_outside_the_limits_fail_as_the_model_runs(bundle):
    with pytest.raises(QexportError, match=r"level must be in 0 to 1\.33333 .*, got 2"):
        qexport.runtime.run(qexport.session(bundle), None, {**feeds(), "noise_scale": np.array(100, np.float32)})


def test_noise_with_a_strategy_in_python(source):
    with pytest.raises(UsageError, match="leave strategy out"):
        qexport.convert(source, "nowhere", noise="bit_flip:0.1", strategy="naive", dry_run=True)
