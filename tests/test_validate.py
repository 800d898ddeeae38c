"""validate: planted errors are found where they are, noise is called noise and bias bias, and the figures are right."""

import json

import decomposed
import numpy as np
import onnx
import pytest
from bundle_factory import HEADS, attribute, make_bundle, site_output
from onnx import numpy_helper

from qexport.bundle import Bundle
from qexport.conversion import convert
from qexport.errors import QexportError, UsageError
from qexport.validation import validate
from qexport.validation.comparison import _groups
from qexport.validation.limits import DEFAULT_MAX_ERROR, ROUNDING
from qexport.validation.probes import LOCAL, beside, ordered_sites
from qexport.validation.statistics import SAMPLING, SYSTEMATIC, TOO_FEW
from qexport.validation.unpadded import as_floats

MODULES = [f"encoder.{i}.attention" for i in range(4)]


def test_an_exact_recipe_passes_in_both_modes(tmp_path):
    make_bundle(tmp_path / "b", attention={"strategy": "exact"})
    report = validate(tmp_path / "b")
    assert report.passed
    assert report.max_error == dict.fromkeys(("library", "fallback", "local", "sites"), ROUNDING["float32"])
    assert report.sensitivity is None
    assert report.baseline_error < 1e-6
    assert report.first_divergent is None
    assert report.first_over_tolerance is None
    for site in report.sites:
        for mode in ("fallback", "propagated", "local"):
            assert site[mode]["relative_error"] < 1e-5
    assert [site["module"] for site in report.sites] == MODULES[:2]


def test_enough_samples_are_exact_and_said_to_be(tmp_path):
    make_bundle(tmp_path / "b", attention={"num_samples": [64]})
    report = validate(tmp_path / "b")
    assert report.passed
    assert report.outputs["library"]["hidden"]["relative_error"] < 1e-5
    assert any("no site had to sample" in note for note in report.notes)


@pytest.mark.parametrize("strategy", ["naive", "stratified", "adaptive"])
def test_unbiased_sampling_is_called_sampling_error_at_every_site(tmp_path, strategy):
    """With a control variate these estimators are unbiased (docs/math.md), so each site alone must show no bias."""
    make_bundle(tmp_path / "b", attention={"strategy": strategy, "num_samples": [3]}, layers=3, sharp=1.0)
    report = validate(tmp_path / "b", seeds=20, batch=4, seq=40, max_error=10)
    for site in report.sites:
        local = site["local"]
        assert local["bias"]["verdict"] == SAMPLING, (site["name"], local)
        assert local["relative_error"] > 0.01
        assert local["bias"]["relative_bias"] < 0.3 * local["bias"]["relative_std"]
    assert report.first_divergent is None
    # fed with the same values, the first site alone and in the model are one thing
    first = report.sites[0]
    assert first["local"]["relative_error_per_seed"] == pytest.approx(
        first["propagated"]["relative_error_per_seed"], rel=1e-4
    )


def test_hybrid_deviates_alike_with_every_seed(tmp_path):
    """With a control variate it draws nothing: its error is systematic, and no fault as long as it is within the limit."""
    make_bundle(tmp_path / "b", attention={"strategy": "hybrid", "num_samples": [3]}, layers=3, sharp=1.0)
    report = validate(tmp_path / "b", seeds=5, batch=4, seq=40, max_error=10)
    assert report.passed
    for site in report.sites:
        bias = site["local"]["bias"]
        assert bias["verdict"] == SYSTEMATIC
        assert bias["relative_std"] < 1e-6
        assert site["local"]["relative_error"] > 0.01
    assert report.first_divergent is None


def test_noise_out_of_tolerance_fails_without_blaming_a_site(tmp_path):
    make_bundle(tmp_path / "b", attention={"num_samples": [2]})
    report = validate(tmp_path / "b", seeds=5, batch=4, seq=40, max_error=0.01)
    assert not report.passed
    assert "output 'hidden' with the library" in report.reasons[0]
    assert report.first_divergent is None
    assert report.first_over_tolerance["module"] == MODULES[0]
    assert any("a larger num_samples lowers it" in note for note in report.notes)
    assert validate(tmp_path / "b", seeds=5, batch=4, seq=40, max_error=5.0).passed


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_wrong_weight_names_the_first_site_behind_it(tmp_path, layer):
    """A weight between attention `layer` and the next is wrong; no attention node is."""

    def plant(model):
        weight = next(t for t in model.graph.initializer if t.name == f"layer{layer}.v.weight")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))

    make_bundle(tmp_path / "b", layers=3, plant=plant)
    report = validate(tmp_path / "b", max_error=5.0)
    assert report.first_divergent["module"] == MODULES[layer]
    assert report.first_divergent["mode"] == "fallback"
    assert not report.passed
    assert "without the library" in report.reasons[0]


@pytest.mark.parametrize("layer", [0, 2])
def test_a_wrong_scale_in_one_sampled_site_is_systematic_there_and_nowhere_else(tmp_path, layer):
    """Both modes see the wrong scale; local errors stay clean elsewhere, since every site is fed with classical values."""

    def plant(model):
        node = next(n for n in model.graph.node if n.name == f"layer{layer}.attention")
        node.attribute.append(onnx.helper.make_attribute("scale", 1.5 / np.sqrt(8)))

    make_bundle(tmp_path / "b", layers=3, plant=plant, attention={"num_samples": [6]}, sharp=1.0)
    report = validate(tmp_path / "b", seeds=12, batch=8, seq=40, max_error=0.02)
    verdicts = [site["local"]["bias"]["verdict"] for site in report.sites]
    assert verdicts == [SYSTEMATIC if i == layer else SAMPLING for i in range(3)]
    assert report.first_divergent["module"] == MODULES[layer]
    assert not report.passed


def test_an_error_that_only_the_kernel_sees_is_named(tmp_path):
    """Windows count for the kernel alone, the fallback at opset 23 has none: here the kernel is told to attend less."""

    def plant(model):
        attribute(model, "layer1.attention", "left_window_size").i = 1

    make_bundle(tmp_path / "b", layers=3, plant=plant, attention={"strategy": "exact"})
    report = validate(tmp_path / "b", batch=2, seq=30)
    assert report.first_divergent["module"] == MODULES[1]
    assert report.first_divergent["mode"] == "local"
    assert not report.passed
    assert all("with the library" in reason for reason in report.reasons)


def test_padding_does_not_count(tmp_path):
    """Without the mask the padded rows differ freely: they may not enter the errors, the rows that count must."""
    make_bundle(tmp_path / "b", attention={"strategy": "exact"})
    short = np.array([[1] * 5 + [0] * 7, [1] * 12])
    data = {"input_ids": np.tile(np.arange(12), (2, 1)), "attention_mask": short}
    report = validate(tmp_path / "b", data)
    assert report.outputs["library"]["hidden"]["elements"] == short.sum() * HEADS * 8
    assert report.sites[0]["local"]["elements"] == short.sum() * HEADS * 8


def test_a_changed_classical_model_is_noticed(tmp_path):
    make_bundle(tmp_path / "b", attention={"strategy": "exact"})
    for name in ("classical.onnx", "model.onnx"):
        model = onnx.load(tmp_path / "b" / name)
        weight = next(t for t in model.graph.initializer if t.name == "layer0.v.weight")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))
        onnx.save(model, tmp_path / "b" / name)
    report = validate(tmp_path / "b")
    assert not report.passed
    assert "differ from the stored ones" in report.reasons[0]


def test_nan_fails(tmp_path):
    def plant(model):
        weight = next(t for t in model.graph.initializer if t.name == "layer1.v.weight")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.nan, weight.name))

    make_bundle(tmp_path / "b", plant=plant)
    report = validate(tmp_path / "b")
    assert not report.passed
    assert report.first_divergent["module"] == MODULES[1]
    assert "NaN" not in json.dumps(report.to_dict(), allow_nan=False)


def test_forbidden_logits_are_the_same_and_no_nan(tmp_path):
    """Minus infinity in both models is no error; the seeds' own infinity would be."""
    banned = "void = Sub(one, one) never = Log(void) part = Slice(hidden, zero, first, second) none = Mul(part, void) "
    extra = banned + "ban = Add(none, never) logits = Concat<axis=2>(ban, hidden)"
    source = decomposed.save(tmp_path, extra=extra, outputs=f", float[batch,sequence,{decomposed.WIDTH + 1}] logits")
    convert(source, tmp_path / "b", strategy="stratified", num_samples=4)
    report = validate(tmp_path / "b", max_error=1.0)
    assert report.passed
    errors = {name: report.outputs["library"][name]["relative_error"] for name in ("hidden", "logits")}
    assert 0 < errors["logits"] == pytest.approx(errors["hidden"])


@pytest.mark.parametrize("value", [np.inf, 0.0, np.nan])
def test_infinity_that_differs_stays_no_number(value):
    base, (same, other) = as_floats(np.array([-np.inf, 1.0]), [np.array([-np.inf, 2.0]), np.array([value, 2.0])])
    np.testing.assert_array_equal(same - base, [0, 1])
    np.testing.assert_array_equal(other - base, [np.nan, 1])


def test_without_the_library(tmp_path):
    make_bundle(tmp_path / "b", attention={"num_samples": [2]})
    report = validate(tmp_path / "b", library=False)
    assert report.passed
    assert report.seeds == []
    assert "library" not in report.outputs
    assert all(site["propagated"] is None and site["local"] is None for site in report.sites)


def test_large_values_are_compared_in_groups(tmp_path, monkeypatch):
    make_bundle(tmp_path / "b", layers=3)
    whole = validate(tmp_path / "b").to_dict()
    monkeypatch.setattr("qexport.validation.comparison.SITE_MEMORY", 1)
    assert [len(group) for group in _groups([np.zeros(4)] * 3, 2)] == [1, 1, 1]
    assert validate(tmp_path / "b").to_dict() == whole


def test_batches_do_not_change_the_figures(tmp_path):
    make_bundle(tmp_path / "b", attention={"strategy": "exact"}, plant=_plant_scale)
    rng = np.random.default_rng(3)
    data = {"input_ids": rng.integers(0, 50, (12, 9))}
    a = validate(tmp_path / "b", data, batch=12).outputs["library"]["hidden"]
    b = validate(tmp_path / "b", data, batch=5).outputs["library"]["hidden"]
    assert a["elements"] == b["elements"]
    assert a["relative_error"] == pytest.approx(b["relative_error"], rel=1e-4)


def _plant_scale(model):
    node = next(n for n in model.graph.node if n.name == "layer0.attention")
    node.attribute.append(onnx.helper.make_attribute("scale", 0.5))


def test_weights_outside_the_model_file(tmp_path):
    """As in a model above 2 GB: both models keep their weights in one external file each."""
    make_bundle(tmp_path / "b", attention={"strategy": "exact"})
    for name in ("classical.onnx", "model.onnx"):
        model = onnx.load(tmp_path / "b" / name)
        options = {"save_as_external_data": True, "location": f"{name}.data", "size_threshold": 256}
        (tmp_path / "b" / name).unlink()
        onnx.save(model, tmp_path / "b" / name, **options)
    report = validate(tmp_path / "b")
    assert report.passed
    assert report.sites[1]["local"]["relative_error"] < 1e-5


def test_sites_come_in_the_order_of_the_graph(tmp_path):
    make_bundle(tmp_path / "b", layers=3)
    bundle = Bundle.open(tmp_path / "b")
    model = onnx.load(bundle.model_path)
    sites = [*reversed(bundle.manifest["sites"]), {"name": "gone", "output": "no such value"}]
    assert [site["layer"] for site in ordered_sites(model, sites)] == [0, 1, 2]


def test_a_site_is_fed_with_the_classical_values(tmp_path):
    make_bundle(tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    model = onnx.load(bundle.model_path)
    hybrid, local, _ = beside(bundle.classical_path, model, bundle.manifest["sites"])
    assert local == {f"layer{i}.attention": site_output(i) + LOCAL for i in range(2)}
    added = [n for n in hybrid.graph.node if n.op_type == "QuantumAttention"]
    classical = [n for n in hybrid.graph.node if n.op_type == "Attention"]
    assert [list(n.input)[:4] for n in added] == [list(n.input) for n in classical]
    # a value that the classical model lacks leaves the site out rather than guessing
    for node in model.graph.node:
        if node.name == "layer1.attention":
            node.input[3] = "a value of the converted model alone"
    for node in (classical_model := onnx.load(bundle.classical_path)).graph.node:
        if node.name == "layer1.attention":
            node.op_type = "Identity"
    onnx.save(classical_model, tmp_path / "c.onnx")
    assert list(beside(tmp_path / "c.onnx", model, bundle.manifest["sites"])[1]) == ["layer0.attention"]


def test_values_of_the_converted_model_alone_are_brought_along(tmp_path):
    """Where the classical model holds decomposed attention, the rewrite makes the site's keys from other values."""

    def plant(model):
        perm = {"perm": [0, 1, 3, 2]}
        twice = [
            onnx.helper.make_node("Transpose", ["layer1.k.heads"], ["turned"], **perm),
            onnx.helper.make_node("Transpose", ["turned"], ["turned back"], **perm),
        ]
        at = next(i for i, n in enumerate(model.graph.node) if n.name == "layer1.attention")
        model.graph.node[at].input[1] = "turned back"
        for node in reversed(twice):
            model.graph.node.insert(at, node)

    make_bundle(tmp_path / "b", plant=plant, attention={"strategy": "exact"})
    bundle = Bundle.open(tmp_path / "b")
    classical = onnx.load(bundle.classical_path)
    next(n for n in classical.graph.node if n.name == "layer1.attention").domain = "com.example"  # not ai.onnx Attention
    onnx.save(classical, tmp_path / "c.onnx")
    hybrid, local, _ = beside(tmp_path / "c.onnx", onnx.load(bundle.model_path), bundle.manifest["sites"])
    assert set(local) == {"layer0.attention", "layer1.attention"}
    assert [n.op_type for n in hybrid.graph.node if "turned" in str(n.output)] == ["Transpose", "Transpose"]
    report = validate(tmp_path / "b")
    assert report.sites[1]["local"]["relative_error"] < 1e-5


@pytest.mark.parametrize("options", [{"seeds": 0}, {"max_error": 0.0}, {"max_error": -1.0}, {"max_error": float("nan")}])
def test_wrong_arguments(tmp_path, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        validate(tmp_path, **options)


def test_a_model_that_does_not_run_is_one_line(tmp_path):
    def plant(model):
        next(n for n in model.graph.node if n.name == "node_layer1.flat").input[1] = "heads_shape"

    make_bundle(tmp_path / "b", plant=plant)
    with pytest.raises(QexportError) as error:
        validate(tmp_path / "b")
    assert "\n" not in str(error.value)


def test_the_default_limit_and_progress(tmp_path):
    make_bundle(tmp_path / "b")
    steps = []
    report = validate(tmp_path / "b", seeds=1, progress=lambda *step: steps.append(step))
    assert report.max_error["library"] == DEFAULT_MAX_ERROR
    assert report.outputs["library"]["hidden"]["relative_error_ci95"] is None
    assert report.outputs["library"]["hidden"]["bias"]["verdict"] == TOO_FEW
    assert len(steps) >= 4
