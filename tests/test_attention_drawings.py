"""Attention maps: the page, the pictures and the command."""

import base64
import json
import re
import struct
import sys
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from bundle_factory import HEADS, TEXT, TOKENS, make_bundle, make_text_bundle
from cli_cases import assert_one_line

import qexport
from qexport.attention import MEASURES, SiteMap, figures, map_attention
from qexport.attention import page as page_module
from qexport.attention import sizes as sizes_module
from qexport.cli import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("maps") / "bundle", layers=3)


@pytest.fixture(scope="module")
def maps(bundle):
    """Of the stored samples, 12 and 7 tokens long."""
    return map_attention(bundle)


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory):
    return make_text_bundle(tmp_path_factory.mktemp("text") / "bundle")


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
        assert not any(label.get_parse_math() for label in drawn[0].get_xticklabels())  # "$x_1$" is no formula
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
    assert_one_line(*run(bundle, "-o", tmp_path, *argv), words, expected=code)


def test_a_text_that_is_too_long(run, text_bundle, tmp_path):
    argv = (text_bundle, "-o", tmp_path, "--text", "cat " * 63)
    assert_one_line(*run(*argv), "65 tokens, the model takes at most 64; shorten it or cut with --seq 64")
    code, out, _ = run(*argv, "--seq", "10", "--no-pictures", "--json")
    assert code == 0
    assert len(json.loads(out)["items"][0]["sites"][0]["queries"]) == 10


def test_maps_that_are_too_large(run, text_bundle, tmp_path, monkeypatch):
    """2 models x 2 layers x 2 heads x 8 x 8 floats are 2048 bytes, 1024 with one head; a layer computes 512."""
    argv = (text_bundle, "-o", tmp_path, "--no-pictures", "--text", TEXT)
    monkeypatch.setattr(sizes_module, "MEMORY_LIMIT", 2047)
    assert_one_line(*run(*argv), "shorten the input (--seq) or choose with --layers and --heads")
    assert run(*argv, "--heads", "1")[0] == 0
    monkeypatch.setattr(sizes_module, "MEMORY_LIMIT", 2048)
    assert run(*argv)[0] == 0
    monkeypatch.setattr(sizes_module, "MEMORY_LIMIT", 511)
    assert_one_line(*run(*argv, "--heads", "1", "--layers", "0"), "the limit is")


def test_no_sites(run, tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sites"] = []
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert_one_line(*run(folder, "-o", tmp_path / "out"), "has no attention that can be observed")


def test_folders_that_cannot_be_written(run, bundle, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line(*run(bundle, "-o", tmp_path / "file"), "a file is there already", expected=2)
    assert_one_line(*run(bundle, "-o", tmp_path / "file" / "below"), "cannot be written")
    (tmp_path / "full" / "attention.html").mkdir(parents=True)  # what root is refused too
    assert_one_line(*run(bundle, "-o", tmp_path / "full", "--no-pictures"), "cannot be written (Is a directory)")
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


def test_without_matplotlib(run, bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_one_line(*run(bundle, "-o", tmp_path / "a"), "pip install 'qexport[plot]', or leave them out with --no-pictures")
    assert run(bundle, "-o", tmp_path / "a", "--no-pictures")[0] == 0


def test_too_many_inputs_for_pictures(run, bundle, tmp_path):
    np.savez(tmp_path / "many.npz", input_ids=np.zeros((17, 3), np.int64))
    assert_one_line(
        *run(bundle, "-o", tmp_path, "--data", tmp_path / "many.npz"), "17 inputs are given, at most 16 are drawn"
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
