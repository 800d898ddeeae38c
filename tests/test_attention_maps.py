"""Attention maps: the arrays against a float64 softmax, the figures of the heads, the tokens that name them."""

import numpy as np
import onnx
import pytest
from bundle_factory import HEAD_SIZE, HEADS, TEXT, TOKENS, make_bundle, make_text_bundle
from onnx import TensorProto, helper

import qexport
from qexport.attention import SiteMap, entropy, map_attention, site_labels
from qexport.external_data import load_structure

# The kernel's softmax is float32.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def values_of(path, feed, names, **options):
    """Values inside a model, by making them outputs."""
    model = load_structure(path)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    probe = path.parent / f"probe_{path.stem}.onnx"
    onnx.save(model, probe)
    found = qexport.session(probe, **options).run(list(names), feed)
    probe.unlink()
    return [value.astype(np.float64) for value in found]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("maps") / "bundle", layers=3)


@pytest.fixture(scope="module")
def feed():
    rng = np.random.default_rng(5)
    mask = np.arange(12) < np.array([[12], [7]])
    return {"input_ids": rng.integers(0, 50, (2, 12)), "attention_mask": mask.astype(np.int64)}


@pytest.fixture(scope="module")
def maps(bundle, feed):
    return map_attention(bundle, feed)


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory):
    return make_text_bundle(tmp_path_factory.mktemp("text") / "bundle")


@pytest.mark.parametrize("which", ["classical", "sampled"])
@pytest.mark.parametrize("layer", [0, 2])
def test_probabilities_are_the_softmax_of_both_models(bundle, feed, maps, which, layer):
    """And padding is left out: the second item has 7 of 12 positions."""
    path, seed = (bundle / "classical.onnx", {}) if which == "classical" else (bundle / "model.onnx", {"seed": np.array(0)})
    names = [f"layer{layer}.q.heads", f"layer{layer}.k.heads"]
    # one item at a time, as data are mapped: draws depend on the place in the batch
    for item, length in ((0, 12), (1, 7)):
        one = {name: array[item : item + 1] for name, array in feed.items()}
        q, k = values_of(path, one | seed, names, library=which == "sampled")
        expected = softmax((q @ k.swapaxes(-1, -2) / np.sqrt(HEAD_SIZE))[0, :, :length, :length])
        site = maps.items[item][layer]
        assert site.classical.shape == (HEADS, length, length)
        np.testing.assert_allclose(getattr(site, which), expected, **CLOSE)


def test_errors_are_those_of_the_outputs(bundle, feed, maps):
    """Against the sites' values of both model files, and (fed with classical values) against what validate finds."""
    one = {name: array[1:] for name, array in feed.items()}
    names = [f"layer{i}.attention.out" for i in range(3)]
    exact = values_of(bundle / "classical.onnx", one, names, library=False)
    sampled = values_of(bundle / "model.onnx", one | {"seed": np.array(0)}, names)
    for site, a, b in zip(maps.items[1], exact, sampled, strict=True):
        a, b = a[0, :, :7].reshape(HEADS, -1), b[0, :, :7].reshape(HEADS, -1)
        np.testing.assert_allclose(
            site.propagated_error, np.linalg.norm(b - a, axis=1) / np.linalg.norm(a, axis=1), rtol=1e-4
        )
    report = qexport.validate(bundle, one, seeds=1)
    for site, found in zip(maps.items[1], report.sites, strict=True):
        worst = found["local"]["worst_head"]
        assert site.own_error[worst["head"]] == pytest.approx(worst["relative_error"], rel=1e-4)


def test_probabilities_move_behind_the_first_site_only(maps):
    for item in maps.items:
        first, *later = item
        assert not first.difference.any()
        np.testing.assert_array_equal(first.own_error, first.propagated_error)
        assert first.own_error.min() > 0.01  # 4 keys of 7 or 12: it did sample
        for site in later:
            half = np.abs(site.sampled.astype(float) - site.classical).sum(axis=2) / 2
            np.testing.assert_allclose(site.moved, half.mean(axis=1), rtol=1e-6)
            assert (site.moved > 0).all()
            assert (site.moved < 1).all()


def test_entropy_and_support():
    one_key, four, mixed = [0, 0, 1, 0], [0.25] * 4, [0.5, 0.25, 0.25, 0]
    np.testing.assert_allclose(entropy(np.array([one_key, four, mixed])), [0, np.log(4), 1.5 * np.log(2)], rtol=1e-12)
    site = SiteMap("a", 0, None, "exact", [0], list("xyz"), list("abcd"), np.array([[one_key, four, mixed]]), *[None] * 3)
    np.testing.assert_allclose(site.support, [[1, 4, 2**1.5]], rtol=1e-12)


def test_a_choice_of_layers_and_heads_is_a_part_of_the_whole(bundle, feed, maps):
    chosen = map_attention(bundle, feed, layers=[2], heads=[1])
    for item, whole in zip(chosen.items, maps.items, strict=True):
        (site,) = item
        assert (site.layer, site.heads) == (2, [1])
        np.testing.assert_array_equal(site.classical, whole[2].classical[[1]])
        np.testing.assert_array_equal(site.sampled, whole[2].sampled[[1]])
        for key, values in site.measures().items():
            np.testing.assert_allclose(values, whole[2].measures()[key][[1]], rtol=1e-12)


def test_seeds_differ_in_the_sampled_model_alone(bundle, feed, maps):
    other = map_attention(bundle, feed, seed=1)
    for item, same in zip(other.items, maps.items, strict=True):
        np.testing.assert_array_equal(item[2].classical, same[2].classical)
        assert (item[2].sampled != same[2].sampled).any()


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    """A causal attention with grouped heads, then one over other states, converted from an .onnx file."""
    folder = tmp_path_factory.mktemp("crossed")
    shapes = {"x": ["batch", "sequence", 32], "memory": ["batch", "states", 16]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", 32])
    nodes = [
        helper.make_node("Slice", ["x", "zero", "sixteen", "last"], ["k"]),
        helper.make_node("Attention", ["x", "k", "k"], ["h"], "self", q_num_heads=4, kv_num_heads=2, is_causal=1),
        helper.make_node("Attention", ["h", "memory", "memory"], ["y"], "cross", q_num_heads=4, kv_num_heads=2),
    ]
    numbers = [onnx.numpy_helper.from_array(np.array([v]), n) for n, v in (("zero", 0), ("sixteen", 16), ("last", 2))]
    graph = helper.make_graph(nodes, "crossed", inputs, [output], initializer=numbers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, folder / "crossed.onnx")
    qexport.convert(folder / "crossed.onnx", folder / "bundle", strategy="naive", num_samples=4)
    return folder / "bundle"


def test_grouped_causal_and_cross_attention(crossed):
    rng = np.random.default_rng(3)
    x, memory = (rng.standard_normal((1, *shape)).astype(np.float32) for shape in ((9, 32), (14, 16)))
    (item,) = map_attention(crossed, {"x": x, "memory": memory}).items
    assert [site.classical.shape for site in item] == [(4, 9, 9), (4, 9, 14)]

    def heads(array, count):
        return array[0].astype(np.float64).reshape(array.shape[1], count, 8).swapaxes(0, 1)

    keys = np.repeat(heads(x[..., :16], 2), 2, axis=0)
    scores = heads(x, 4) @ keys.swapaxes(1, 2) / np.sqrt(8)
    causal = softmax(np.where(np.tri(9, dtype=bool), scores, -np.inf))
    np.testing.assert_allclose(item[0].classical, causal, **CLOSE)
    states = np.repeat(heads(memory, 2), 2, axis=0)
    for which, first in (("classical", causal @ keys), ("sampled", None)):
        if first is None:
            (h,) = values_of(crossed / "model.onnx", {"x": x, "memory": memory, "seed": np.array(0)}, ["h"])
            first = heads(h, 4)
        expected = softmax(first @ states.swapaxes(1, 2) / np.sqrt(8))
        np.testing.assert_allclose(getattr(item[1], which), expected, rtol=2e-4, atol=1e-6)
    assert item[1].keys == [str(j) for j in range(14)]


def test_tokens_name_queries_and_keys(text_bundle, bundle, feed, maps):
    (item,) = map_attention(text_bundle, [TEXT]).items
    assert item[0].queries == item[0].keys == TOKENS
    assert maps.items[1][0].queries == [str(i) for i in feed["input_ids"][1, :7]]  # no tokenizer: the ids


def test_names_of_sites():
    def sites(*modules):
        return [SiteMap("n", i, m, "exact", [], [], [], *[None] * 4) for i, m in enumerate(modules)]

    assert site_labels(sites("model.layers.0.attn", "model.layers.1.attn")) == ["0", "1"]
    assert site_labels(sites("l.0.self", "l.0.cross", "l.1.self")) == ["0.self", "0.cross", "1.self"]
    assert site_labels(sites("a.b", "a.b")) == ["0", "1"]
    assert site_labels(sites("a", "a.b")) == ["a", "a.b"]
    assert site_labels(sites(None, "a.b")) == ["0", "1"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": [-1]}, "heads must be >= 0, got -1"),
        ({"heads": []}, "heads must hold at least one number"),
        ({"layers": []}, "layers must hold at least one number"),
        ({"library": False}, "attention maps come from the op library"),
    ],
)
def test_wrong_arguments(bundle, options, words):
    with pytest.raises(qexport.UsageError, match=words):
        map_attention(bundle, **options)


def test_values_that_are_not_finite(tmp_path):
    def overflow(model):
        weight = next(t for t in model.graph.initializer if t.name == "layer1.q.weight")
        weight.raw_data = np.full(list(weight.dims), np.nan, np.float32).tobytes()

    with pytest.raises(qexport.QexportError, match=r"attention layer1\.attention are not finite"):
        map_attention(make_bundle(tmp_path / "bundle", plant=overflow))


def test_a_mask_that_hides_everything(bundle, feed):
    twice = {name: np.concatenate([array, array]) for name, array in feed.items()}
    twice["attention_mask"][len(feed["attention_mask"]) :] = 0
    with pytest.raises(qexport.QexportError, match="the mask of this input hides every position"):
        map_attention(bundle, twice)


def test_keys_of_cross_attention_are_not_the_tokens_of_as_many_queries(tmp_path):
    """A decoder of ids over states and, in a second attention, over the embedding of other ids, all of one length."""
    rng = np.random.default_rng(4)
    table = onnx.numpy_helper.from_array(rng.standard_normal((20, 16)).astype(np.float32), "table")
    shape = ["batch", "length"]
    ids = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("input_ids", "decoder_input_ids")]
    states = helper.make_tensor_value_info("states", TensorProto.FLOAT, [*shape, 16])
    heads = {"q_num_heads": 2, "kv_num_heads": 2}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["e"]),
        helper.make_node("Gather", ["table", "decoder_input_ids"], ["d"]),
        helper.make_node("Attention", ["d", "states", "states"], ["a"], "over_states", **heads),
        helper.make_node("Attention", ["a", "e", "e"], ["b"], "over_tokens", **heads),
        helper.make_node("Add", ["b", "d"], ["c"]),
        helper.make_node("Attention", ["c", "c", "c"], ["y"], "self", **heads),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape, 16])
    graph = helper.make_graph(nodes, "decoder", [*ids, states], [output], initializer=[table])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), tmp_path / "m.onnx")
    qexport.convert(tmp_path / "m.onnx", tmp_path / "bundle", num_samples=2)
    feed = {"input_ids": np.array([[1, 2, 3]]), "decoder_input_ids": np.array([[7, 8, 9]])}
    feed["states"] = rng.standard_normal((1, 3, 16)).astype(np.float32)
    (item,) = map_attention(tmp_path / "bundle", feed).items
    assert [site.queries for site in item] == [["7", "8", "9"]] * 3
    assert [site.keys for site in item] == [["0", "1", "2"], ["1", "2", "3"], ["7", "8", "9"]]
