"""Attention maps: the arrays against a float64 softmax, the figures of the heads, the page, the pictures, the command."""

import base64
import json
import re
import struct
import sys
import zlib
from html.parser import HTMLParser

import numpy as np
import onnx
import pytest
from bundle_factory import HEAD_SIZE, HEADS, make_bundle
from onnx import TensorProto, helper

import qexport
from qexport.attention import MEASURES, SiteMap, entropy, figures, map_attention, site_labels
from qexport.attention import page as page_module
from qexport.attention import sizes as sizes_module
from qexport.cli import main
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
    """A bundle with a tokenizer of words, among them some that would break a page or a picture."""
    import tokenizers

    folder = make_bundle(tmp_path_factory.mktemp("maps") / "text")
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "cat", "sat", "</script><b>", "$x_1$", "日本"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


TEXT = "the cat sat </script><b> $x_1$ 日本"
TOKENS = ["[CLS]", "the", "cat", "sat", "</script><b>", "$x_1$", "日本", "[SEP]"]


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


class _Page(HTMLParser):
    """What a page refers to, and its data."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.data, self.inside = [], [], "", None

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        self.inside = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data):
        if self.inside == "data":
            self.data += data


def png(text: str) -> np.ndarray:
    data = base64.b64decode(text)
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert (data[:8], depth, colour) == (b"\x89PNG\r\n\x1a\n", 8, 0)
    (size,) = struct.unpack(">I", data[33:37])
    assert struct.unpack(">I", data[41 + size : 45 + size])[0] == zlib.crc32(data[37 : 41 + size])
    lines = np.frombuffer(zlib.decompress(data[41 : 41 + size]), np.uint8).reshape(height, width + 1)
    return lines[:, 1:].astype(float)


def parsed(maps):
    text = page_module.page(maps)
    page = _Page()
    page.feed(text)
    return text, page, json.loads(page.data)


def test_the_page_needs_nothing_else(text_bundle):
    text, page, data = parsed(map_attention(text_bundle, [TEXT]))
    assert page.links == []
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|fetch\(|XMLHttpRequest|\bimport\b *[({'\"]", text)
    assert page.tags.count("script") == 2  # no token has ended one or begun an element
    assert "b" not in page.tags
    assert data["items"][0]["sites"][0]["queries"] == TOKENS
    assert set(re.findall(r'\$\("(\w+)"\)', text)) <= set(re.findall(r'id="(\w+)"', text))


def test_the_page_holds_the_maps(maps):
    _, _, data = parsed(maps)
    assert data["block"] == 1
    assert [m["key"] for m in data["measures"]] == list(MEASURES)
    for item, shown in zip(maps.items, data["items"], strict=True):
        for site, found in zip(item, shown["sites"], strict=True):
            for i in range(HEADS):
                p = found["top"] * (png(found["classical"][i]) / 255) ** 2
                # half a step of the square root, times the slope 2 sqrt(p), and the half step squared
                step = np.sqrt(found["top"]) / 510
                assert (np.abs(p - site.classical[i]) <= 2 * np.sqrt(site.classical[i]) * step + step**2 + 1e-6).all()
                signed = (png(found["difference"][i]) - 128) / 127
                d, step = found["top_difference"] * np.sign(signed) * signed**2, np.sqrt(found["top_difference"]) / 254
                bound = 2 * np.sqrt(np.abs(site.difference[i])) * step + step**2 + 1e-6
                assert (np.abs(d - site.difference[i]) <= bound).all()
            for key, values in site.measures().items():
                np.testing.assert_allclose(found["measures"][key], values, rtol=1e-3)


def test_maps_too_large_for_a_page_are_drawn_in_blocks(maps, monkeypatch):
    monkeypatch.setattr(page_module, "MOST_CELLS", 400)  # all maps have 3 * 2 * (144 + 49) = 1158 cells
    _, _, data = parsed(maps)
    assert data["block"] == 2
    site, shown = maps.items[1][2], data["items"][1]
    found = png(shown["sites"][2]["classical"][0])
    assert found.shape == (4, 4)  # 7 x 7 in blocks of 2 x 2
    assert found[3, 3] == np.rint(255 * np.sqrt(site.classical[0, 6, 6] / site.top))
    assert found[0, 1] == np.rint(255 * np.sqrt(site.classical[0, :2, 2:4].max() / site.top))


def test_pictures_show_the_arrays_and_the_tokens(text_bundle):
    (item,) = map_attention(text_bundle, [TEXT]).items
    for what in ("classical", "sampled", "difference"):
        figure = figures.plot_site(item[1], what)
        drawn = [ax for ax in figure.axes if ax.get_title()]
        assert [ax.get_title().split(":")[0] for ax in drawn] == ["head 0", "head 1"]
        for i, ax in enumerate(drawn):
            np.testing.assert_array_equal(ax.images[0].get_array(), getattr(item[1], what)[i])
        assert [label.get_text() for label in drawn[0].get_xticklabels()] == TOKENS
        assert [label.get_text() for label in drawn[0].get_yticklabels()] == TOKENS
    small = [ax for ax in figures.plot_all(item).axes if ax.images and ax.get_label() != "<colorbar>"]
    np.testing.assert_array_equal(small[3].images[0].get_array(), item[1].classical[1] / item[1].top)
    summary = [ax for ax in figures.plot_summary(item).axes if ax.get_title()]
    assert [ax.get_title() for ax in summary] == list(MEASURES.values())
    matrix = summary[3].images[0].get_array()
    np.testing.assert_allclose(matrix[1, :HEADS], 100 * item[1].own_error)
    np.testing.assert_allclose(matrix[1, -1], 100 * item[1].own_error.mean())


@pytest.mark.parametrize("count", [3, 40, 41, 200, 1500])
def test_names_at_an_axis_have_room(count):
    inches, step = figures._side(count)
    assert inches * step / count >= figures.LABEL
    assert inches <= figures.LARGEST_NAMED
    assert step == 1 or count > 40


@pytest.fixture
def run(capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def command(*argv):
        with pytest.raises(SystemExit) as stop:
            main(["attention", *map(str, argv)])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return command


def test_the_command_writes_a_page_and_pictures(run, text_bundle, tmp_path):
    code, out, err = run(text_bundle, "--text", TEXT, "--text", "the cat", "-o", tmp_path / "a" / "b", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["schema"], report["schema_version"]) == ("qexport.attention", 1)
    written = {path.name: path.read_bytes() for path in (tmp_path / "a" / "b").iterdir()}
    assert sorted(report["files"]) == sorted(str(tmp_path / "a" / "b" / name) for name in written)
    layers = ["layer_00", "layer_00_difference", "layer_01", "layer_01_difference"]
    pictures = {f"input_{i}_{name}.png" for i in (1, 2) for name in ("summary", "all", *layers)}
    assert set(written) == {"attention.html", *pictures}
    assert all(written[name].startswith(b"\x89PNG") for name in pictures)
    assert [item["sites"][0]["keys"] for item in report["items"]] == [TOKENS, ["[CLS]", "the", "cat", "[SEP]"]]
    expected = map_attention(text_bundle, [TEXT, "the cat"]).items[1][1]
    assert report["items"][1]["sites"][1]["support"] == pytest.approx(expected.support.mean(axis=1).tolist())


def test_the_command_in_words(run, text_bundle, tmp_path):
    code, out, _ = run(text_bundle, "--text", TEXT, "--heads", "1", "--layers", "0,1", "--no-pictures", "-o", tmp_path)
    assert code == 0
    assert "encoder.1.attention" in out
    assert "8 x 8" in out
    assert "attention.html" in out
    assert [path.name for path in tmp_path.iterdir()] == ["attention.html"]


def test_stored_samples_without_data(run, bundle, tmp_path):
    code, out, _ = run(bundle, "-o", tmp_path, "--no-pictures", "--json")
    assert code == 0
    assert [len(item["sites"][0]["queries"]) for item in json.loads(out)["items"]] == [12, 7]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--text", "word"], 1, "has no tokenizer/tokenizer.json, so it takes no text; give an .npz file"),
        (["--layers", "3"], 2, "layers: 3 is not there"),
        (["--heads", "0,2"], 2, "heads: 2 is not there; layer 0 has the heads 0 to 1"),
        (["--data", "none.npz"], 1, "none.npz: no such data file"),
        (["--seq", "100"], 2, "sequence 100 is longer than the model takes (64)"),
    ],
)
def test_errors_of_the_command(run, bundle, tmp_path, argv, code, words):
    assert_one_line(run(bundle, "-o", tmp_path, *argv), words, code)


def assert_one_line(result, words, code=1):
    got, out, err = result
    assert got == code, err
    assert out == ""
    assert err.startswith("qexport: error: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_text_that_is_too_long(run, text_bundle, tmp_path):
    argv = (text_bundle, "-o", tmp_path, "--text", "cat " * 63)
    assert_one_line(run(*argv), "65 tokens, the model takes at most 64; shorten it or cut with --seq 64")
    code, out, _ = run(*argv, "--seq", "10", "--no-pictures", "--json")
    assert code == 0
    assert len(json.loads(out)["items"][0]["sites"][0]["queries"]) == 10


def test_maps_that_are_too_large(run, text_bundle, tmp_path, monkeypatch):
    """2 models x 2 layers x 2 heads x 8 x 8 floats are 2048 bytes, 1024 with one head; a layer computes 512."""
    argv = (text_bundle, "-o", tmp_path, "--no-pictures", "--text", TEXT)
    monkeypatch.setattr(sizes_module, "MEMORY_LIMIT", 2047)
    assert_one_line(run(*argv), "shorten the input (--seq) or choose with --layers and --heads")
    assert run(*argv, "--heads", "1")[0] == 0
    monkeypatch.setattr(sizes_module, "MEMORY_LIMIT", 2048)
    assert run(*argv)[0] == 0
    monkeypatch.setattr(sizes_module, "MEMORY_LIMIT", 511)
    assert_one_line(run(*argv, "--heads", "1", "--layers", "0"), "the limit is")


def test_no_sites(run, tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sites"] = []
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert_one_line(run(folder, "-o", tmp_path / "out"), "has no attention that can be observed")


def test_folders_that_cannot_be_written(run, bundle, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line(run(bundle, "-o", tmp_path / "file"), "a file is there already", 2)
    assert_one_line(run(bundle, "-o", tmp_path / "file" / "below"), "cannot be written")
    (tmp_path / "full" / "attention.html").mkdir(parents=True)  # what root is refused too
    assert_one_line(run(bundle, "-o", tmp_path / "full", "--no-pictures"), "cannot be written (Is a directory)")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["attention.html"]


def test_a_failure_leaves_nothing_behind(bundle, tmp_path, monkeypatch):
    def fail(item):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figures, "plot_all", fail)
    with pytest.raises(qexport.QexportError, match=r"cannot be written \(No space left on device\)"):
        map_attention(bundle, output=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(qexport.UsageError):
        map_attention(bundle, layers=[7], output=tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": [-1]}, "heads: -1 is not there"),
        ({"heads": []}, "heads must name at least one"),
        ({"layers": []}, "layers must name at least one"),
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
    hidden = feed | {"attention_mask": np.zeros_like(feed["attention_mask"])}
    with pytest.raises(qexport.QexportError, match="the mask of this input hides every position"):
        map_attention(bundle, hidden)


def test_without_matplotlib(run, bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_one_line(run(bundle, "-o", tmp_path / "a"), "pip install 'qexport[plot]', or leave them out with --no-pictures")
    assert run(bundle, "-o", tmp_path / "a", "--no-pictures")[0] == 0


def test_too_many_inputs_for_pictures(run, bundle, tmp_path):
    np.savez(tmp_path / "many.npz", input_ids=np.zeros((17, 3), np.int64))
    assert_one_line(
        run(bundle, "-o", tmp_path, "--data", tmp_path / "many.npz"), "17 inputs are given, at most 16 are drawn"
    )
    assert len(map_attention(bundle, tmp_path / "many.npz").items) == 17


def test_text_and_data_exclude_each_other(run, bundle, tmp_path):
    code, _, err = run(bundle, "--text", "a", "--data", "b.txt", "-o", tmp_path)
    assert code == 2
    assert "--text and --data exclude each other" in err


def test_long_maps_keep_their_large_entries_in_pictures():
    """A diagonal of 1501 positions on a few hundred dots; a mean of blocks would leave a third of it."""
    p = np.eye(1501, dtype=np.float32)[None]
    names = [str(i) for i in range(1501)]
    site = SiteMap("a", 0, None, "exact", [0], names, names, p, p, np.zeros(1), np.zeros(1))
    (ax, _) = figures.plot_site(site).axes
    drawn = ax.images[0].get_array()
    assert 300 < len(drawn) < 600
    np.testing.assert_array_equal(np.diag(drawn), 1)
    block = -(-1501 // len(drawn))
    assert ax.images[0].get_extent() == [-0.5, len(drawn) * block - 0.5, len(drawn) * block - 0.5, -0.5]
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, 1500.5), (1500.5, -0.5))


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
