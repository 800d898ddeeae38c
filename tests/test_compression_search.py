"""What a search measures, chooses and remembers: inputs of weights, gains, the front of sizes, findings of stopped runs."""

from contextlib import contextmanager

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from bundle_factory import make_bundle
from compression_cases import VOCAB, language_model, model_of, random, run, token_ids

from qexport import runtime
from qexport.bundle import Bundle
from qexport.compression import calibration
from qexport.compression.calibration import calibrate, weights_of
from qexport.compression.checkpoint import Checkpoint
from qexport.compression.forms import KEEP
from qexport.compression.layers import find_layers
from qexport.compression.model import open_model
from qexport.compression.search import Search
from qexport.compression.trials import Trials, opened
from qexport.data import load_inputs
from qexport.errors import QexportError
from qexport.metrics import choose_metric
from qexport.recipe_compression import METHODS


def quiet(*_):
    pass


def made(model, folder) -> Bundle:
    """A bundle of a model whose attention stays classical."""
    folder.mkdir()
    return open_model(model, folder, None, None, None, quiet)[0]


def calibrated(bundle, data, store):
    """The layers of a bundle, and their inputs in `store`."""
    layers, inputs = find_layers(ir.load(bundle.model_path)), load_inputs(bundle, data)
    calibrate(bundle, layers, inputs, True, store, quiet)
    return {layer.name: layer for layer in layers}, inputs


@contextmanager
def searching(bundle, data, folder, methods=METHODS, metric=None):
    """A prepared search, fitted to and judged on the same data, and its trials."""
    store = Checkpoint(folder / "store", {})
    layers, inputs = calibrated(bundle, data, store)
    layers, classical = list(layers.values()), runtime.session(bundle.classical_path, library=False)
    with opened(bundle, layers, True) as session:
        chosen = choose_metric(bundle, inputs, classical, metric)
        trials = Trials(bundle, session, classical, chosen, inputs.feeds)
        search = Search(layers, lambda layer: methods, trials, trials, trials, store, quiet)
        search.prepare()
        yield search, trials


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    return made(language_model(folder / "lm.onnx"), folder / "bundle")


@pytest.mark.parametrize("memory", [1 << 30, 1])  # all at once, or each in a run of its own
def test_the_gram_matrices_are_those_of_the_inputs(lm, tmp_path, monkeypatch, memory):
    monkeypatch.setattr(calibration, "GRAM_MEMORY", memory)
    store = Checkpoint(tmp_path / "store", {})
    ids = token_ids(items=20)
    layers, _ = calibrated(lm, ids, store)
    for weight, value in (("wq", "x"), ("up", "h"), ("down", "r"), ("words", "z")):
        model = onnx.load(lm.model_path)
        del model.graph.output[:]
        model.graph.output.append(onnx.ValueInfoProto(name=value))
        X = run(model, ids).astype(np.float64)
        X = X.reshape(-1, X.shape[-1])
        G = X.T @ X
        np.testing.assert_allclose(weights_of(layers[weight], store), G, rtol=1e-4, atol=1e-6 * np.trace(G))


def test_tables_count_their_entries(tmp_path):
    head = '<ir_version: 10, opset_import: ["": 23]> g (int64[n,k] i) => (float[n,k,64] y)'
    text = f"{head} {{ h = Gather(w, i) y = MatMul(h, v) }}"
    onnx.save(model_of(text, {"w": random(80, 64), "v": random(64, 64)}), tmp_path / "m.onnx")
    bundle, store = made(tmp_path / "m.onnx", tmp_path / "bundle"), Checkpoint(tmp_path / "store", {})
    ids = np.array([[3, 3, 3, 79], [0, 3, 5, 79]])
    layers, _ = calibrated(bundle, {"i": ids}, store)
    weights = weights_of(layers["w"], store)
    shares = np.bincount(ids.ravel(), minlength=80) / ids.size
    # a third of the weight is spread over all entries: other inputs pick others
    np.testing.assert_allclose(weights / weights.sum(), shares * 2 / 3 + 1 / 3 / 80)


def test_padding_is_no_input(tmp_path):
    bundle = Bundle.open(make_bundle(tmp_path / "bundle", hidden=256))
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 50, (3, 10)), np.ones((3, 10), np.int64)
    mask[1, 4:] = 0
    found = []
    for i in range(2):
        store = Checkpoint(tmp_path / f"store{i}", {})
        layers, _ = calibrated(bundle, {"input_ids": ids, "attention_mask": mask}, store)
        found.append([weights_of(layer, store) for layer in layers.values()])
        ids = np.where(mask, ids, (ids + 7) % 50)
    assert len(found[0]) == 4
    for before, after in zip(*found, strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * np.trace(before))


def test_the_front_of_sizes(lm, tmp_path):
    with searching(lm, token_ids(16), tmp_path) as (search, trials):
        costs, loads = ([getattr(state, name) for state in search.states] for name in ("cost", "load"))
        assert len(costs) > 10
        assert (np.diff(costs) < 0).all()
        assert (np.diff(loads) > 0).all()
        assert {option.choice.kind for option in search.states[0].options} == {KEEP}
        assert loads[0] == 0
        assert costs[-1] == search.smallest()
        # the method that a layer was probed with has the error that the model then had
        for layer, options in zip(search.layers, search.places, strict=True):
            errors = []
            for option in options[1:]:
                weights = {layer.name: layer.as_stored(search.form(layer, option.choice).dense())}
                errors.append(option.load / trials.measure(weights).error ** 2)
            assert np.abs(np.array(errors) - 1).min() < 1e-3, layer.name


def test_the_choice_within_a_size(lm, tmp_path):
    with searching(lm, token_ids(16), tmp_path) as (search, trials):
        whole = sum(layer.nbytes for layer in search.layers)
        found = [search.within(whole / ratio) for ratio in (1, 2, 3, 4, 6)]
        for candidate, ratio in zip(found, (1, 2, 3, 4, 6), strict=True):
            assert candidate.nbytes <= whole / ratio
            assert candidate.measured == trials.measure(search.dense(candidate.methods))
        assert found[0].measured.error < 1e-5  # nothing need change
        errors = [candidate.measured.error for candidate in found]
        assert errors == sorted(errors)
        assert search.within(0).nbytes == search.smallest()
        before = len(search.candidates)
        assert search.within(whole / 3) is found[2]  # tried once
        assert len(search.candidates) == before


def test_the_smallest_within_a_loss(lm, tmp_path):
    with searching(lm, token_ids(16), tmp_path, metric="cosine") as (search, _):
        assert search.within_loss(-1.0) is None
        sizes = []
        for loss in (1e-6, 1e-4, 1e-2, 1.0):
            found = search.within_loss(loss)
            assert found.measured.loss <= loss
            sizes.append(found.nbytes)
            smaller = [tried for tried in search.candidates if tried.nbytes < found.nbytes]
            assert all(tried.measured.loss > loss for tried in smaller)
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > 1.3 * sizes[-1] == 1.3 * search.smallest()


def test_what_is_not_allowed_is_not_used(lm, tmp_path):
    with searching(lm, token_ids(8), tmp_path, methods=("int8",)) as (search, _):
        assert {(m.kind, m.bits) for m in search.within(0).methods} == {("int", 8)}
    with searching(lm, token_ids(8), tmp_path / "none", methods=()) as (search, _):
        assert {m.kind for m in search.within(0).methods} == {KEEP}
        assert search.smallest() == sum(layer.nbytes for layer in search.layers)


@pytest.mark.parametrize("items", [21, 22])  # of 12 tokens: 252 and 264 of the 256 that 64 inputs ask for
def test_few_inputs_make_no_factors(lm, tmp_path, items):
    with searching(lm, token_ids(items), tmp_path) as (search, _):
        kinds = {
            layer.name: {option.choice.kind for option in options}
            for layer, options in zip(search.layers, search.places, strict=True)
        }
        unseen = {layer.name for layer in search.unseen}
    assert ("low-rank" in kinds["up"]) == (items == 22)
    assert "low-rank" not in kinds["down"]  # of 160 inputs
    assert "down" in unseen
    assert ("up" in unseen) == (items == 21)


def test_a_layer_is_not_broken_for_its_size(tmp_path):
    """A weight whose numbers are too small for any scale in float16 becomes zero in whole numbers: it stays as it is."""
    path = language_model(tmp_path / "lm.onnx", up=lambda w: w * 1e-9, down=lambda w: w * 1e9)
    with searching(made(path, tmp_path / "bundle"), token_ids(8), tmp_path, methods=("int8", "int4")) as (search, _):
        methods = dict(zip((layer.name for layer in search.layers), search.within(0).methods, strict=True))
        assert methods["up"].kind == KEEP
        assert methods["wq"].kind == "int"


def test_findings_are_kept_and_taken_up(tmp_path):
    folder, calls = tmp_path / "store", []

    def compute():
        calls.append(1)
        return np.arange(VOCAB)

    store = Checkpoint(folder, {"model": "a"})
    assert not folder.exists()
    assert not store.resumed
    for again in (store, store, Checkpoint(folder, {"model": "a"})):
        np.testing.assert_array_equal(again.compute("x y", compute), np.arange(VOCAB))
    assert len(calls) == 1
    assert Checkpoint(folder, {"model": "a"}).resumed
    other = Checkpoint(folder, {"model": "b"})  # findings about another model
    assert not other.resumed
    assert not folder.exists()
    other.compute("x y", compute)
    assert len(calls) == 2
    other.remove()
    assert not folder.exists()


def test_a_half_written_finding_is_none(tmp_path, monkeypatch):
    store = Checkpoint(tmp_path / "store", {})
    store.save("whole", np.ones(3))

    def stopped(file, array):
        file.write(b"\x93NUMPY half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        store.save("half", np.ones(3))
    monkeypatch.undo()
    again = Checkpoint(tmp_path / "store", {})
    assert again.resumed
    assert again.has("whole")
    assert not again.has("half")
    assert again.compute("half", lambda: np.zeros(2)).tolist() == [0, 0]


def test_runs_that_share_a_folder(tmp_path, monkeypatch):
    """Two may store one finding at a time, and one may remove what the other was about to read."""
    ours, theirs, write = Checkpoint(tmp_path / "store", {}), Checkpoint(tmp_path / "store", {}), np.save
    ours.save("known", 1)

    def slow(file, array):
        file.write(b"\x93NUMPY half")
        monkeypatch.setattr(np, "save", write)
        monkeypatch.setattr("os.getpid", lambda: -1)
        theirs.save("x", np.arange(3))
        monkeypatch.undo()
        file.seek(0)
        np.save(file, array)

    monkeypatch.setattr(np, "save", slow)
    ours.save("x", np.arange(3))
    np.testing.assert_array_equal(ours.load("x"), np.arange(3))
    assert sorted(path.suffix for path in (tmp_path / "store").iterdir()) == [".json", ".npy", ".npy"]
    theirs.remove()
    with pytest.raises(QexportError, match="let one run at a time write an output"):
        ours.load("x")


def test_a_folder_without_its_key_is_none_of_ours(tmp_path):
    (tmp_path / "store").mkdir()  # stopped between the folder and the key
    store = Checkpoint(tmp_path / "store", {})
    assert not store.resumed
    store.save("x", 1)
    assert Checkpoint(tmp_path / "store", {}).resumed


def test_findings_that_cannot_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(QexportError, match=r"file/store: cannot store a finding \(Not a directory\)") as caught:
        Checkpoint(tmp_path / "file" / "store", {}).save("x", 1)
    assert "\n" not in str(caught.value)

    def full(file, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(QexportError, match=r"store: cannot store a finding \(No space left on device\); free"):
        Checkpoint(tmp_path / "store", {}).save("x", 1)
