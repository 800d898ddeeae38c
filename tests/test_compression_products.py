"""Products of whole numbers: what a file computes, what a runtime makes of it, and which products become such ones."""

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from compression_cases import language_model, model_of, random, run, token_ids
from onnx import TensorProto, numpy_helper
from test_compression_graph import COLUMNS, FOUND, ROWS, WEIGHT, feed_of, seen_of, text, with_weight
from test_compression_search import calibrated, made, quiet

from qexport import runtime
from qexport.compression import nodes, speed
from qexport.compression.calibration import weights_of
from qexport.compression.checkpoint import Checkpoint
from qexport.compression.decoding import TOP
from qexport.compression.forms import HALF, INTEGER, TRELLIS, Method
from qexport.compression.layers import find_layers
from qexport.compression.products import Rounded, candidates, multiply
from qexport.compression.trials import Trials, opened
from qexport.knapsack import Option, front, last_within
from qexport.metrics import choose_metric

PRODUCTS = [case for case in FOUND if "linear" in FOUND[case][2]]
FORMS = [None, Method(HALF), Method(INTEGER, 8, 32), Method(INTEGER, 4, 32), Method(TRELLIS, rate=3.5)]


def eased(rows: int) -> Rounded:
    """The weight `w` with an ease of powers of two, which round nothing by themselves."""
    return Rounded(("w",), 1.0, (2.0 ** (np.arange(rows) % 5 - 2)).astype(np.float16))


def rounded_input(X: np.ndarray) -> np.ndarray:
    """X as ONNX defines DynamicQuantizeLinear and its inverse."""
    low, high = min(X.min(), 0), max(X.max(), 0)
    step = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / step), 0, 255)
    return (np.clip(np.rint(X / step) + zero, 0, 255) - zero) * step


def whole(model: onnx.ModelProto, method: Method | None = None) -> tuple[onnx.ModelProto, np.ndarray, Rounded]:
    """(the model whose products with `w` are of whole numbers, the matrix that they have in place of it, its ease)."""
    graph = ir.from_proto(model)
    layers = find_layers(graph)
    layer = next(layer for layer in layers if layer.name == "w")
    W, group = layer.matrix(), eased(layer.matrix().shape[0])
    if method is not None:
        form = seen_of(layer).make(method)
        nodes.store(graph, layer, form, as_matrix=True)
        W = form.dense()
    multiply(graph, layers, (group,))
    written = ir.to_proto(graph)
    onnx.checker.check_model(written)
    return written, group.matrix(W), group


def optimised(model: onnx.ModelProto, folder) -> onnx.ModelProto:
    """What onnxruntime makes of a model when it loads it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


@pytest.mark.parametrize(("case", "method"), list(itertools.product(PRODUCTS, FORMS)), ids=str)
def test_a_product_is_that_of_the_rounded_input_with_the_rounded_matrix(case, method):
    source, weights, *_ = FOUND[case]
    model = model_of(source, weights)
    written, W, group = whole(model, method)
    layer = next(layer for layer in find_layers(ir.from_proto(model)) if layer.name == "w")
    assert np.linalg.norm(W - layer.matrix()) <= 0.2 * np.linalg.norm(layer.matrix())  # strings of 3.5 bits lose a tenth
    feed, ease = feed_of(model), group.ease.astype(np.float32)
    if "x" in feed and layer.products[0].inputs[0].name == "x" and len(layer.products) == 1 and not layer.picks:
        X = rounded_input(feed["x"] * ease) / ease
        bias = weights.get("b", 0)
        np.testing.assert_allclose(run(written, feed), X @ W + bias, rtol=1e-4, atol=1e-5 * np.abs(X @ W).max())
    # an input of 8 bits is off by half a step of 1/255 of its range, here some 6 times its root mean square
    table = with_weight(model, "w", layer.as_stored(W))
    expected = run(table, feed)
    most = 0.2 if layer.picks else 0.05  # here rows are picked from the matrix before it was rounded for the product
    assert 0 < np.linalg.norm(run(written, feed) - expected) < most * np.linalg.norm(expected)


@pytest.mark.parametrize("opset", range(17, 25))
@pytest.mark.parametrize("method", FORMS, ids=str)
def test_every_opset_and_what_the_runtime_makes_of_it(tmp_path, opset, method):
    """One node with whole numbers for its weight, made when the file is loaded; nothing else is left to do."""
    model = model_of(text("a = MatMul(x, w) y = Add(a, b)", opset=opset), WEIGHT | {"b": random(COLUMNS)})
    written, W, group = whole(model, method)
    found = optimised(written, tmp_path)
    assert [node.op_type for node in found.graph.node] == ["Mul", "DynamicQuantizeMatMul"]
    arrays = [numpy_helper.to_array(tensor) for tensor in found.graph.initializer]
    (codes,) = (array for array in arrays if array.ndim == 2)
    assert codes.dtype == np.int8
    assert np.abs(codes).max() == TOP
    # the sum of two products with inputs of 8 bits, which some processors hold in 16 bits with a sign
    assert 2 * 255 * np.abs(codes.astype(int)).max() < 2**15
    ease = group.ease.astype(np.float32)[:, None]
    largest = np.abs(W / ease).max(0)
    (scales,) = (a for a in arrays if a.shape == (COLUMNS,) and np.allclose(a * TOP, largest, rtol=1e-3))
    np.testing.assert_allclose(codes * scales * ease, W, rtol=1e-5, atol=1e-7)


def test_one_input_is_rounded_once_for_all_that_read_it(tmp_path):
    source = text("p = MatMul(x, w) q = MatMul(x, v) y = Add(p, q)")
    graph = ir.from_proto(model_of(source, WEIGHT | {"v": random(ROWS, COLUMNS, seed=7)}))
    layers = find_layers(graph)
    multiply(graph, layers, (Rounded(("w", "v"), 1.0),))
    written = ir.to_proto(graph)
    assert [node.op_type for node in written.graph.node].count("DynamicQuantizeLinear") == 1
    kinds = [node.op_type for node in optimised(written, tmp_path).graph.node]
    assert (kinds.count("DynamicQuantizeLinear"), kinds.count("MatMulIntegerToFloat")) == (1, 2)


def test_additions_before_a_norm_stay_apart(tmp_path):
    """onnxruntime's node for both takes three times as long as the two."""
    source = text(
        "a = MatMul(x, w) s = Add(a, z) y = LayerNormalization(s, g) ", f"float[n,k,{ROWS}] x, float[n,k,{COLUMNS}] z"
    )
    model = model_of(source, WEIGHT | {"g": np.ones(COLUMNS, np.float32)})
    assert "SkipLayerNormalization" in [node.op_type for node in optimised(model, tmp_path).graph.node]
    written, *_ = whole(model)
    kinds = [node.op_type for node in optimised(written, tmp_path).graph.node]
    assert {"Sum", "LayerNormalization"} <= set(kinds)
    assert "SkipLayerNormalization" not in kinds


def test_a_weight_of_zeros_and_one_that_is_huge():
    W = random(ROWS, COLUMNS)
    W[:, 3], W[:, 5], W[7] = 0, 1e30, 0
    written, rounded, _ = whole(model_of(text("y = MatMul(x, w)"), {"w": W}))
    assert np.isfinite(rounded).all()
    assert not rounded[:, 3].any()
    found = run(written, {"x": np.eye(ROWS, dtype=np.float32)})
    assert (np.abs(found - rounded) <= 1e-2 * np.abs(rounded).max(0)).all()


# -- which ones


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    return made(language_model(folder / "lm.onnx"), folder / "bundle")


def test_the_ease_makes_the_product_of_the_norms_least(lm, tmp_path):
    store = Checkpoint(tmp_path / "store", {})
    layers, _ = calibrated(lm, token_ids(40), store)
    group = next(group for group in candidates(list(layers.values()), store) if "up" in group.layers)
    gram, W, ease = weights_of(layers["up"], store), layers["up"].matrix(), group.ease.astype(np.float64)

    def norms(e):
        return np.sqrt((np.diag(gram) * e**2).sum() * np.square(W / e[:, None]).sum())

    least = norms(ease)
    assert least < 0.999 * norms(np.ones_like(ease))
    rng = np.random.default_rng(0)
    for _ in range(20):  # float16 rounds the ease, which costs the square of 2^-11
        assert least <= norms(ease * rng.uniform(0.8, 1.25, len(ease))) * (1 + 1e-6)


def test_an_input_that_is_larger_than_all_others_does_not_cost_them_their_digits():
    """One input a hundred times as large as the others: with one step for all of them these would be a few codes."""
    rng = np.random.default_rng(0)
    X, W = rng.standard_normal((200, 96)).astype(np.float32), random(96, 64)
    X[:, 11] *= 100
    W[11] /= 100
    seen, size = np.sqrt(np.square(X).mean(0)), np.linalg.norm(W, axis=1)
    errors = []
    for ease in (None, np.sqrt(size / seen).astype(np.float16)):
        group, e = Rounded(("w",), 1.0, ease), 1 if ease is None else ease.astype(np.float32)
        errors.append(np.linalg.norm(rounded_input(X * e) / e @ group.matrix(W) - X @ W) / np.linalg.norm(X @ W))
    assert errors[0] > 0.3
    assert errors[1] < 0.05


def test_products_that_read_one_input_go_together_and_narrow_ones_stay(tmp_path):
    source = text("a = MatMul(x, w) b = MatMul(x, v) c = Mul(a, b) d = MatMul(c, wide) y = MatMul(d, narrow)")
    weights = WEIGHT | {"v": random(ROWS, COLUMNS, seed=7), "wide": random(COLUMNS, 192), "narrow": random(192, 32)}
    onnx.save(model_of(source, weights), tmp_path / "m.onnx")
    bundle, store = made(tmp_path / "m.onnx", tmp_path / "bundle"), Checkpoint(tmp_path / "store", {})
    layers, _ = calibrated(bundle, {"x": random(50, ROWS)}, store)
    found = {group.layers: group.saved for group in candidates(list(layers.values()), store)}
    assert list(found) == [("w", "v"), ("wide",)]
    # 50 rows; what it takes to round an input is taken off
    assert found["w", "v"] == 50 * ROWS * (2 * COLUMNS - 32)


def test_the_last_state_that_holds():
    states = front([[Option(i, 10.0 - i, float(i)) for i in range(8)]])
    loads = [state.load for state in states]
    assert last_within(states, lambda state: state.load <= -1) is None
    for limit in loads:
        assert last_within(states, lambda state, limit=limit: state.load <= limit).load == limit


def test_products_lose_half_of_what_may_be_lost_at_most(lm, tmp_path):
    store = Checkpoint(tmp_path / "store", {})
    layers, inputs = calibrated(lm, token_ids(24), store)
    layers, classical = list(layers.values()), runtime.session(lm.classical_path, library=False)
    metric, counts = choose_metric(lm, inputs, classical, "cosine"), []
    with opened(lm, [], True) as session:
        trials = Trials(lm, session, classical, metric, inputs.feeds)
        for most in (1e-9, 1.2e-4, 0.5):
            found = speed.rounded_products(lm, layers, trials, trials, most, True, store, quiet)
            counts.append(sum(len(group.layers) for group in found))
            with opened(lm, [], True, rounded=found) as rounded:
                assert trials.of(rounded).measure({}).loss <= most * speed.SHARE + 1e-7  # float32 rounds the cosines
    assert counts[0] == 0 < counts[1] < counts[2] == 7


def test_trials_of_fed_weights_are_those_of_the_file(lm):
    """Weights that are fed are rounded as it runs, those of a file when it is loaded: to the same codes."""
    layers = find_layers(ir.load(lm.model_path))
    group = Rounded(("up",), 1.0, np.linspace(0.5, 2, 64).astype(np.float16))
    changed, feed = random(64, 160, seed=9), token_ids(4)
    graph = ir.from_proto(with_weight(onnx.load(lm.model_path), "up", changed))
    multiply(graph, find_layers(graph), (group,))
    expected = run(ir.to_proto(graph), feed)
    with opened(lm, layers, True, rounded=(group,)) as session:
        np.testing.assert_allclose(runtime.run(session, None, {**feed, "up": changed})[0], expected, rtol=1e-3, atol=1e-4)
        assert np.abs(runtime.run(session, None, feed)[0] - expected).max() > 0.01


def test_a_weight_of_float16_is_none_of_them(tmp_path):
    path = language_model(tmp_path / "half.onnx", dtype=np.float16)
    bundle, store = made(path, tmp_path / "bundle"), Checkpoint(tmp_path / "store", {})
    layers, _ = calibrated(bundle, token_ids(8), store)
    assert {layer.value.const_value.dtype for layer in layers.values()} == {TensorProto.FLOAT16}
    assert candidates(list(layers.values()), store) == []


def test_inputs_are_eased_where_that_helps(tmp_path, monkeypatch):
    """The first product has an input a hundred times as large as the others, the second has inputs of one size. With few
    items chance alone makes a difference of some percent."""
    monkeypatch.setattr(speed, "PLAIN", 0.1)
    W, v, rng = random(ROWS, 128), random(128, COLUMNS, seed=3), np.random.default_rng(0)
    W, v = W / np.linalg.norm(W, axis=0), v / np.linalg.norm(v, axis=1)[:, None]
    W[11] /= 100
    source = text("a = MatMul(x, w) b = Relu(a) y = MatMul(b, v)")
    onnx.save(model_of(source, {"w": W, "v": v}), tmp_path / "m.onnx")
    X = rng.standard_normal((240, ROWS)).astype(np.float32)
    X[:, 11] *= 100
    bundle, store = made(tmp_path / "m.onnx", tmp_path / "bundle"), Checkpoint(tmp_path / "store", {})
    layers, inputs = calibrated(bundle, {"x": X}, store)
    layers, classical = list(layers.values()), runtime.session(bundle.classical_path, library=False)
    metric = choose_metric(bundle, inputs, classical, "cosine")
    with opened(bundle, [], True) as session:
        trials = Trials(bundle, session, classical, metric, inputs.feeds)
        found = speed.rounded_products(bundle, layers, trials, trials, 0.5, True, store, quiet)
    assert {group.layers[0]: group.ease is not None for group in found} == {"w": True, "v": False}
