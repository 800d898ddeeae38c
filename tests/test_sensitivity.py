"""Models that quantise as they run: what rounding alone does to them is measured, and no more is allowed for."""

import numpy as np
import onnx
from bundle_factory import attribute, make_bundle

from qexport.bundle import Bundle
from qexport.data import load_inputs
from qexport.validation import validate
from qexport.validation.limits import ROUNDING
from qexport.validation.sensitivity import sensitivity


def quantise(folder):
    """Make both models quantise the input of every query projection as they run, as int8 graphs do."""
    for name in ("classical.onnx", "model.onnx"):
        model = onnx.load(folder / name)
        for i in (0, 1):
            at = next(k for k, n in enumerate(model.graph.node) if n.name == f"node_layer{i}.up")
            source = model.graph.node[at].input[0]
            names = [f"{source}/{part}" for part in ("q", "scale", "zero")]
            model.graph.node[at].input[0] = f"{source}/back"
            model.graph.node.insert(at, onnx.helper.make_node("DequantizeLinear", names, [f"{source}/back"]))
            model.graph.node.insert(at, onnx.helper.make_node("DynamicQuantizeLinear", [source], names))
        onnx.save(model, folder / name)


def test_a_model_that_quantises_is_judged_by_what_rounding_does_to_it(tmp_path):
    make_bundle(tmp_path / "b", attention={"strategy": "exact"})
    quantise(tmp_path / "b")
    data = {"input_ids": np.random.default_rng(0).integers(0, 50, (200, 60))}
    report = validate(tmp_path / "b", data, batch=100, seeds=1)
    assert report.passed
    # two ulps flip a step somewhere in 200 * 60 * 16 values: rounding does more than the 3e-7 without quantisation
    assert report.sensitivity["hidden"] > 1e-6
    assert report.max_error["fallback"] >= 5e-3
    assert report.max_error["local"] == ROUNDING["float32"]
    assert "quantises as it runs" in report.notes[0]


def test_a_wrong_site_of_a_model_that_quantises_fails(tmp_path):
    def plant(model):
        attribute(model, "layer1.attention", "left_window_size").i = 30

    make_bundle(tmp_path / "b", attention={"strategy": "exact"}, plant=plant)
    quantise(tmp_path / "b")
    data = {"input_ids": np.random.default_rng(0).integers(0, 50, (2, 40))}
    report = validate(tmp_path / "b", data, max_error=0.001)
    assert report.first_divergent["module"] == "encoder.1.attention"
    assert any("is wrong by itself" in reason for reason in report.reasons)


def test_the_perturbation_is_two_ulps(tmp_path):
    make_bundle(tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    changes = sensitivity(bundle, load_inputs(bundle), bundle.manifest["sites"])
    assert 1e-8 < changes["hidden"] < 3e-6
