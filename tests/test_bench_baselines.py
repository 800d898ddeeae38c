"""bench.baselines: the model in torch runs the attention that it is given, layer by layer, and tables say who did what."""

import json

import numpy as np
import onnx
import pytest
import torch

from bench import baselines, comparisons
from bench.packages import RegistryAwayError, fetch
from qexport.scaling import baselines as attentions

PACKAGES = {"Performer": "performer_pytorch", "Linformer": "linformer"}
IDS = np.random.default_rng(0).integers(1000, 20000, (2, 24))


@pytest.fixture(scope="module")
def classical():
    return baselines.TorchSession(None, threads=1).run(None, {"input_ids": IDS})[0]


@pytest.fixture(scope="module")
def contenders(module_path):
    return baselines.contenders(module_path, threads=1)


def need_package(name: str):
    """Skip where the package of a contender, of the [bench] extra, is not installed."""
    for start, package in PACKAGES.items():
        if name.startswith(start):
            pytest.importorskip(package)


def test_an_exact_attention_leaves_the_model_as_it_is(classical):
    session = baselines.TorchSession(lambda seed: attentions.top_k(24, False), threads=1)
    assert [i.name for i in session.get_inputs()] == ["input_ids"]
    np.testing.assert_allclose(session.run(None, {"input_ids": IDS})[0], classical, atol=1e-4)


def test_every_layer_has_its_own_attention_and_a_seed_its_own_draws(classical):
    made, called = [], []

    def make(seed):
        made.append(seed)
        uniform = attentions.uniform(6, seed)

        def attend(q, k, v):
            called.append(seed)
            assert q.shape == (2, baselines.HEADS, 24, baselines.SIZE)
            return uniform(q, k, v)

        return attend

    session = baselines.TorchSession(make, threads=1)
    first, again, other = (session.run(None, {"input_ids": IDS, "seed": np.array(s)})[0] for s in (0, 0, 1))
    assert made == list(range(12))  # the layers of seed 0, then those of seed 1; the second run had them already
    assert called == [*range(6), *range(6), *range(6, 12)]
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, atol=0.01)
    assert not np.allclose(first, classical, atol=0.01)


def test_a_model_that_does_not_call_the_attention_is_an_error(monkeypatch):
    session = baselines.TorchSession(lambda seed: attentions.uniform(6), threads=1)
    monkeypatch.setattr(session, "_model", lambda ids: torch.zeros(1))
    with pytest.raises(ValueError, match="did not call scaled_dot_product_attention in every layer"):
        session.run(None, {"input_ids": IDS})


@pytest.mark.parametrize("name", [name for name in baselines.FUNCTIONS if name != "classical"])
def test_what_draws_is_known_by_its_name(name):
    """Two seeds give two results where the name says so, and one where not."""
    need_package(name)
    contender = baselines.Contender(name, baselines.TORCH, lambda: None)
    q, k, v = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 1, 12, 40, 32), dtype=np.float32))
    with torch.inference_mode():
        first, second = (baselines.FUNCTIONS[name](seed)(q, k, v) for seed in (0, 1))
    assert contender.draws == (not torch.equal(first, second))
    assert contender.seeds(3) == ([0, 1, 2] if contender.draws else [None])


def test_both_runtimes_are_converted_and_timed(contenders, monkeypatch):
    for package in PACKAGES.values():
        pytest.importorskip(package)
    monkeypatch.setattr(baselines, "LENGTHS", (24,))
    assert [c.name for c in contenders if c.runtime == baselines.ONNXRUNTIME] == ["classical", *baselines.RECIPES]
    assert [c.name for c in contenders if c.runtime == baselines.TORCH] == list(baselines.FUNCTIONS)
    exact = {c.runtime: c.open().run(None, {"input_ids": IDS})[0] for c in contenders if c.name == "classical"}
    np.testing.assert_allclose(exact[baselines.ONNXRUNTIME], exact[baselines.TORCH], atol=1e-3)
    (eight,) = (c for c in contenders if c.name == "stratified, 8 keys")
    first, second = (eight.open().run(None, {"input_ids": IDS, "seed": np.array(s)})[0] for s in (0, 1))
    assert not np.allclose(first, second, atol=0.01)
    rows = baselines.runs(contenders, seconds=0.0)
    assert [(row["attention"], row["runtime"]) for row in rows] == [(c.name, c.runtime) for c in contenders]
    for row in rows:
        assert row["ms_p25"] <= row["ms"] <= row["ms_p75"]
        if row["attention"] == "classical":
            assert row["x_classical"] == 1.0


def test_nothing_is_masked(contenders):
    """Ours read no mask that the others have not."""
    (file,) = (c.open.args[0] for c in contenders if c.name == "tree, 64 keys")
    nodes = [node for node in onnx.load(file).graph.node if node.op_type == "QuantumAttention"]
    assert len(nodes) == baselines.LAYERS
    assert {node.input[3] for node in nodes} == {""}


def test_tables_of_the_file_stay_if_the_parameters_are_the_same(tmp_path):
    file = tmp_path / "baselines.json"
    assert baselines.kept(str(file), {"seeds": 3}) == baselines.kept(None, {"seeds": 3}) == {}
    file.write_text(json.dumps({"parameters": {"seeds": 3}, "runs": [{"n": 16}], "other": [1]}))
    assert baselines.kept(str(file), {"seeds": 3}) == {"runs": [{"n": 16}]}
    assert baselines.kept(str(file), {"seeds": 5}) == {}


@pytest.mark.registry
def test_tasks_tell_a_good_attention_from_a_bad_one(contenders):
    try:
        fetch("text2vec")
    except RegistryAwayError as error:
        pytest.skip(str(error))
    pytest.importorskip("performer_pytorch")
    found = [c for c in contenders if c.name in ("classical", "default", "Performer")]
    rows = {(row["attention"], row["runtime"]): row for row in baselines.sts_b(found, draws=1, limit=30)}
    assert rows["classical", "onnxruntime"]["loss_percent"] == 0
    assert rows["classical", "torch"]["cosine"] > 0.9999
    assert rows["default", "onnxruntime"]["cosine"] > 0.999
    assert rows["Performer", "torch"]["cosine"] < 0.9


def test_every_contender_of_the_results_is_in_the_figures():
    results = comparisons.load("baselines")
    lines = comparisons.baselines().splitlines()
    for name in {row["attention"] for row in results["runs"]} - {"classical"}:
        assert sum(line.startswith(f"| {name} |") for line in lines) == 1, name
    assert sum(line.startswith("| classical, ") for line in lines) == 2
    lines = comparisons.scaling().splitlines()
    for contender in comparisons.load("scaling")["contenders"]:
        assert sum(line.startswith(f"| {contender['name']} |") for line in lines) == 1, contender["name"]
