"""validate on recipes of tolerance and precision: what they allow, and the op's own estimate beside the measured error."""

import numpy as np
import onnx
import pytest
from bundle_factory import HEADS, make_bundle

from qexport.validation import validate
from qexport.validation.certificate import CertificateAccumulator, head_weights
from qexport.validation.limits import DEFAULT_MAX_ERROR, LOW_PRECISION, ROUNDING
from qexport.validation.statistics import ESTIMATED, EXACT, SAMPLING, SYSTEMATIC, ErrorAccumulator
from qexport.validation.unpadded import by_head


def scaled_by(factor):
    """A plant for `make_bundle`: the first attention gets another scale than the classical one."""

    def plant(model):
        node = next(n for n in model.graph.node if n.name == "layer0.attention")
        node.attribute.append(onnx.helper.make_attribute("scale", factor / np.sqrt(8)))

    return plant


@pytest.mark.parametrize("precision", ["auto", "bf16", "int8"])
@pytest.mark.parametrize("strategy", ["exact", "tree"])
def test_low_precision_counts_as_rounding_at_the_sites_that_ask_for_it(tmp_path, strategy, precision):
    """A planted scale moves the outputs by more than float32 rounds and less than the precision may."""

    plant = scaled_by(1.0005)
    attention = {"strategy": strategy, "num_samples": [64], "precision": precision}
    make_bundle(tmp_path / "low", plant=plant, attention=attention | {"error_tolerance": 0.002 * (strategy == "tree")})
    report = validate(tmp_path / "low", batch=2, seq=40)
    assert report.max_error["library"] == LOW_PRECISION[precision]
    assert ROUNDING["float32"] < report.sites[0]["local"]["relative_error"] < LOW_PRECISION[precision]
    assert report.sites[0]["local"]["bias"]["verdict"] == EXACT
    assert report.first_divergent["mode"] == "fallback"  # the classical body computes in float32
    make_bundle(tmp_path / "full", plant=plant, attention=attention | {"precision": "fp32"})
    report = validate(tmp_path / "full", batch=2, seq=40, max_error=1e-5)
    assert report.sites[0]["local"]["bias"]["verdict"] == SYSTEMATIC


def test_the_limit_is_the_tolerance_of_the_recipe(tmp_path):
    attention = {"strategy": "tree", "error_tolerance": 0.03, "precision": "auto"}
    make_bundle(tmp_path / "b", attention=attention)
    assert validate(tmp_path / "b").max_error["library"] == 0.03
    make_bundle(tmp_path / "b", attention=attention | {"error_tolerance": 0.0})
    assert validate(tmp_path / "b").max_error["library"] == DEFAULT_MAX_ERROR


def test_a_site_above_its_tolerance_is_noted(tmp_path):
    attention = {"strategy": "tree", "num_samples": [64], "precision": "fp32", "error_tolerance": 0.01}
    make_bundle(tmp_path / "b", plant=scaled_by(1.1), attention=attention)
    notes = [note for note in validate(tmp_path / "b").notes if "above its tolerance" in note]
    assert len(notes) == 1
    assert "encoder.0.attention" in notes[0]


def test_a_tree_shows_its_own_estimate_beside_the_measured_error(tmp_path):
    attention = {"strategy": "tree", "num_samples": [16], "precision": "fp32", "residual": "verify_only"}
    make_bundle(tmp_path / "b", attention=attention, sharp=1.0)
    data = {"input_ids": np.random.default_rng(0).integers(0, 50, (2, 64))}
    report = validate(tmp_path / "b", data, seeds=6, max_error=1.0)
    for site in report.sites:
        found, measured = site["certificate"], site["local"]["relative_error"]
        assert found["worst_head"]["head"] == site["local"]["worst_head"]["head"]
        assert measured / 3 <= found["relative_error"] + 1e-5
        assert found["relative_error"] <= 3 * measured + 1e-5
        assert 0 <= found["heads_covered"] <= 1
        assert site["local"]["bias"]["verdict"] in (EXACT, SAMPLING, ESTIMATED)
    assert report.first_divergent is None


@pytest.mark.parametrize(("precision", "said"), [("bf16", True), ("fp32", False)])
def test_an_estimate_of_zero_is_told_from_rounding(tmp_path, precision, said):
    attention = {"strategy": "tree", "num_samples": [64], "precision": precision, "error_tolerance": 0.01}
    make_bundle(tmp_path / "b", attention=attention)
    report = validate(tmp_path / "b")
    assert [site["certificate"]["relative_error"] for site in report.sites] == [0, 0]
    assert "tree read every key: the tolerance needs it here, or it is cheaper at this length" in report.notes
    rounding = f"what it errs by is rounding, at precision {precision}; convert --precision fp32 has less"
    assert (rounding in report.notes) is said


def test_an_error_that_is_more_than_rounding_is_not_called_so(tmp_path):
    attention = {"strategy": "tree", "num_samples": [64], "precision": "bf16", "error_tolerance": 0.01}
    make_bundle(tmp_path / "b", plant=scaled_by(1.1), attention=attention)
    assert not [note for note in validate(tmp_path / "b").notes if "rounding" in note]


def test_strategies_without_an_estimate_have_no_certificate(tmp_path):
    make_bundle(tmp_path / "b", attention={"strategy": "exact"}, per_layer={1: {"strategy": "stratified"}})
    assert [site["certificate"] for site in validate(tmp_path / "b").sites] == [None, None]


def test_a_certificate_weighs_as_the_measured_errors_do():
    """Exact estimates of planted errors: site and heads then agree with what is measured, padding left out."""
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((3, 2, 5, 4)) * np.array([1.0, 10.0])[:, None, None]
    noise = rng.standard_normal(exact.shape) * np.array([0.2, 0.01])[:, None, None]
    mask = np.arange(5) < np.array([[5], [3], [4]])
    kept = mask[:, None, :, None]
    estimate = np.sqrt(((noise * kept) ** 2).sum((2, 3)) / ((exact * kept) ** 2).sum((2, 3)))
    errors, certificate = ErrorAccumulator(1, HEADS), CertificateAccumulator(HEADS)
    padded = (2, mask)
    errors.add(by_head(exact, HEADS, padded), [by_head(exact + noise, HEADS, padded)])
    certificate.add(head_weights(exact, HEADS, padded), [estimate])
    np.testing.assert_allclose(certificate.per_head(), errors.head_errors(), rtol=1e-12)
    found = certificate.to_dict(errors, 0.0)
    assert found["relative_error"] == pytest.approx(errors.relative_errors()[0], rel=1e-12)
    assert found["heads_covered"] == 1
    flat = exact.swapaxes(1, 2).reshape(3, 5, 8)
    np.testing.assert_allclose(head_weights(flat, HEADS, (1, mask)), head_weights(exact, HEADS, padded), rtol=1e-12)
    certificate.add(head_weights(exact, HEADS, padded), [estimate * 0.1])
    assert certificate.to_dict(errors, 0.0)["heads_covered"] == 1
    halved = CertificateAccumulator(HEADS)
    halved.add(head_weights(exact, HEADS, padded), [estimate / 2])
    assert halved.to_dict(errors, 0.0)["heads_covered"] == 0
