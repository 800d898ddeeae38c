"""qexport compress: the command line."""

import json
import shutil

import numpy as np
import pytest
from bundle_factory import make_bundle
from compression_cases import token_ids

from qexport.errors import QexportError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle", hidden=256)


def test_models_that_cannot_be_timed(qexport, lm, tmp_path, monkeypatch):
    """The same without timing takes up what was found, wherever that is kept."""

    def failing(*args, **kwargs):
        raise QexportError("no timer")

    monkeypatch.setattr("qexport.profiling.profile", failing)
    np.savez(tmp_path / "data.npz", **token_ids())
    words = ("compress", lm, "-o", tmp_path / "out", "--ratio", "5", "--data", tmp_path / "data.npz", "-q")
    for findings in ((), ("--findings", tmp_path / "findings")):
        code, _, err = qexport(*words, *findings)
        (folder,) = (tmp_path / "findings").iterdir() if findings else [tmp_path / ".out.compress"]
        assert code == 1
        assert err.startswith(f"qexport: error: no timer; what was found so far is kept in {folder}: ")
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()
        code, out, _ = qexport(*words, *findings, "--no-profile")
        assert code == 0
        assert "took up what another run had found" in out
        assert folder.exists() == bool(findings)
        shutil.rmtree(tmp_path / "out")


def test_the_command(qexport, lm, bundle, tmp_path):
    np.savez(tmp_path / "data.npz", **token_ids())
    data = ("--data", tmp_path / "data.npz")
    code, out, err = qexport("compress", lm, "-o", tmp_path / "out", "--ratio", "5", *data, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["schema"], found["passed"]) == ("qexport.compress", True)
    assert found["profile"]["bundle"] == str(tmp_path / "out")
    assert set(found["profile"]["sizes"][0]["models"]) == {"classical", "converted"}
    code, out, err = qexport("compress", lm, "-o", tmp_path / "out", "--ratio", "50", *data, "--no-profile")
    assert code == 3
    assert "FAILED: a ratio of 50 cannot be reached" in out
    assert f"next: qexport validate {tmp_path / 'out'}" in out
    code, out, err = qexport("compress", lm, "-o", tmp_path / "out", "--ratio", "50", *data, "--no-profile", "--json")
    assert (code, json.loads(out)["passed"]) == (3, False)
    code, out, _ = qexport("compress", bundle, "-o", tmp_path / "out", "--ratio", "2", "--no-profile", "-v", "-q")
    assert code == 0
    for words in ("note: ", "Weights", "layer0.up", "x smaller", "cosine", "error of hidden"):
        assert words in out


@pytest.mark.parametrize(
    ("words", "expected", "message"),
    [
        (("--ratio", "1"), 2, "compress.ratio: must be a number above 1"),
        (("--ratio", "nan"), 2, "got nan"),
        (("--max-drop", "100%"), 2, "compress.max_drop: must lie between 0 and 1"),
        (("--max-drop", "nan"), 2, "got nan"),
        (("--ratio", "3", "--max-drop", "1%"), 2, "exclude each other"),
        (("--methods", "int8,int3"), 2, "'int8,int3'"),
        (("--heal", "5"), 2, "heal needs a torch model"),
        (("--task", "causal-lm"), 2, "Hugging Face"),
        (("--metric", "cosine", "--data", "no.npz"), 1, "no.npz: no such data file"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(qexport, lm, tmp_path, words, expected, message):
    code, out, err = qexport("compress", lm, "-o", tmp_path / "out", "-q", *words)
    assert (code, out) == (expected, "")
    assert err.startswith("qexport: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("--ratio", "much"), ("--max-drop", "little"), ("--opset", "16"), ("--metric", "bleu")])
def test_the_command_with_words_that_are_none(qexport, lm, tmp_path, words):
    code, out, err = qexport("compress", lm, "-o", tmp_path / "out", *words)
    assert (code, out) == (2, "")
    assert words[1] in err


def test_the_command_and_a_recipe(qexport, lm, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("compress:\n  ratio: 3\n  size: 4\n")
    code, _, err = qexport("compress", lm, "-o", tmp_path / "out", "--config", recipe)
    assert code == 2
    assert f"{recipe}: compress.size: no such key" in err
    recipe.write_text("compress:\n  ratio: 3\n")
    code, out, _ = qexport("convert", lm, "-o", tmp_path / "out", "--config", recipe)
    assert (code, out) == (2, "")
    assert not (tmp_path / "out").exists()


def test_the_command_that_was_interrupted(qexport, lm, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    words = "qexport: interrupted; nothing was left half-written"
    kept = f"; what was found so far is kept in {tmp_path / '.out.compress'}: "
    # before anything is found, and behind it
    for place, note in (("trials.Trials.measure", "\n"), ("job.refit", kept)):
        with monkeypatch.context() as patched:
            patched.setattr(f"qexport.compression.{place}", stopped)
            code, out, err = qexport("compress", lm, "-o", tmp_path / "out", "-q", "--no-profile")
        assert (code, out) == (130, "")
        assert err.lstrip("\n").startswith(words + note)
        assert [path.name for path in tmp_path.iterdir()] == ([".out.compress"] if note == kept else [])
