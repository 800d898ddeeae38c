"""Noise in a trained model: MiniLM on English sentences."""

import numpy as np
import pytest

import qexport
from qexport.data import load_inputs
from qexport.demo import SENTENCES, minilm_folder


@pytest.fixture(scope="module")
def bundle(module_path):
    path = module_path / "minilm"
    qexport.convert(minilm_folder(), path, noise="depolarizing:0.02", shots=1024)
    return path


def test_minilm_bears_some_noise(bundle):
    """0.01 on every qubit costs the embeddings less than 1 %, 0.2 more; inversion gives most of that back."""
    report = qexport.measure_resilience(
        bundle, SENTENCES, levels=[0.01, 0.2], shots=["inf", 1024], mitigation=["none", "readout_inversion"], seeds=2
    )
    assert (report.metric["name"], report.sites, report.left_alone) == ("cosine", 6, [])
    loss = {(c["mitigation"], c["shots"], c["level"]): c["loss"]["mean"] for c in report.cells}
    for shots in ("inf", 1024):
        assert loss["none", shots, 0.0] < loss["none", shots, 0.01] < 0.01 < 0.05 < loss["none", shots, 0.2]
        assert loss["readout_inversion", shots, 0.2] < loss["none", shots, 0.2] / 4
    assert loss["readout_inversion", "inf", 0.2] < 1e-6
    plain = next(line for line in report.thresholds if (line["mitigation"], line["shots"]) == ("none", "inf"))
    assert 0.01 < plain["level"] < 0.2


def test_the_converted_file_is_the_model_of_the_sweep(bundle):
    """What the command measures is what the file computes: the same draws at the same level, shots and seed."""
    opened = qexport.session(bundle)
    inputs = load_inputs(qexport.bundle.Bundle.open(bundle), SENTENCES)
    classical = qexport.session(bundle / "classical.onnx", library=False)
    norms = np.zeros(2)
    for feed in inputs.feeds:
        keep = feed["attention_mask"] == 1
        exact = classical.run(["last_hidden_state"], feed)[0][keep].astype(np.float64)
        noisy = opened.run(["last_hidden_state"], {**feed, "seed": np.array(0)})[0][keep]
        norms += [((noisy - exact) ** 2).sum(), (exact**2).sum()]
    report = qexport.measure_resilience(bundle, SENTENCES, levels=[0.02], shots=[1024], seeds=1)
    cell = next(cell for cell in report.cells if cell["level"] == 0.02)
    assert cell["output_error"]["mean"] == pytest.approx(np.sqrt(norms[0] / norms[1]), rel=1e-5)
