"""The command line as a user meets it: exit codes, clean JSON, quick help, Ctrl-C."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from bundle_factory import make_bundle
from cli_cases import processor_time

from qexport.cli import COMMANDS
from qexport.cli.render import show_sites


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("cli") / "bundle")


def test_help_of_every_command(qexport):
    code, out, _ = qexport("--help")
    assert code == 0
    for name in COMMANDS:
        assert name in out
        code, text, _ = qexport(name, "--help")
        assert code == 0
        assert "--json" in text or name == "completion"  # whose answer is a script


def test_help_is_quick():
    command = [sys.executable, "-P", "-m", "qexport", "--help"]
    assert 0 < processor_time(lambda: subprocess.run(command, check=True, capture_output=True)) < 0.3


def test_convert_validate_profile_inspect(qexport, bundle, tmp_path):
    target = tmp_path / "bundle"
    code, out, err = qexport("convert", bundle / "classical.onnx", "-o", target, "--error-tolerance", "2%", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [(site["strategy"], site["error_tolerance"]) for site in report["sites"]] == [("tree", 0.02)] * 2
    code, out, err = qexport("validate", target, "--max-error", "200%", "--json")
    assert code == 0, err
    assert json.loads(out)["passed"] is True
    code, out, err = qexport("profile", target, "--runs", "3", "--seq", "8,16", "--json")
    assert code == 0, err
    assert [size["sequence"] for size in json.loads(out)["sizes"]] == [8, 16]
    code, out, err = qexport("inspect", target, "--json")
    assert code == 0, err
    assert len(json.loads(out)["attention"]) == 2


def test_text_output(qexport, bundle):
    code, out, _ = qexport("validate", bundle, "--max-error", "200%")
    assert code == 0
    assert "encoder.0.attention" in out
    assert "PASSED" in out
    code, out, _ = qexport("profile", bundle, "--runs", "3", "--seq", "16")
    assert code == 0
    assert "p50 ms" in out
    assert "QuantumAttention" in out
    code, out, _ = qexport("profile", bundle, "--runs", "3", "--seq", "16", "--memory")
    assert code == 0
    for words in ("model/run", "left behind", "leak in", "bytes per token of model", "node by node, converted"):
        assert words in out
    assert "torch_cpu" not in out, "nobody asked for it"
    code, out, _ = qexport("inspect", bundle)
    assert code == 0
    assert "encoder.1.attention" in out


@pytest.mark.parametrize(
    ("recipe", "line"),
    [
        ({"seed": 0, "layers": []}, "recipe    none given"),
        ({"seed": 7, "strategy": "exact", "layers": []}, "recipe    seed 7, strategy exact"),
        ({"seed": 0, "layers": [{"match": "*0", "strategy": "exact"}]}, "recipe    1 override by layer"),
        ({"seed": 0, "compress": {"ratio": 4}}, None),
    ],
)
def test_inspect_says_what_the_recipe_asked_for(qexport, bundle, tmp_path, recipe, line):
    file = shutil.copytree(bundle, tmp_path / "b") / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"recipe": recipe}))
    code, out, _ = qexport("inspect", tmp_path / "b")
    assert code == 0
    assert [text for text in out.splitlines() if text.startswith("recipe")] == ([line] if line else [])


def test_an_estimate_is_shown_where_something_was_left_out(capsys):
    def site(name, estimate):
        error = {"relative_error": 0.02, "relative_error_ci95": None}
        measured = error | {"worst_head": {"head": 1, "relative_error": 0.03}, "bias": {"verdict": "as estimated"}}
        found = {"relative_error": estimate, "worst_head": {"head": 1, "relative_error": 2 * estimate}}
        recipe = {"strategy": "tree", "num_samples": [64], "precision": "auto"}
        return {"name": name, "local": measured, "propagated": error, "certificate": found} | recipe

    show_sites([site("some", 0.01), site("all", 0.0)], verbose=False)
    out = capsys.readouterr().out
    assert "estimated (worst head)" in out
    assert "1 % (2 %)" in out
    assert "all keys read" in out
    show_sites([site("all", 0.0)], verbose=False)
    out = capsys.readouterr().out
    assert "estimated" not in out.replace("as estimated", "")
    assert "recipe tree, 64 keys, auto precision" in out


def test_out_of_tolerance_is_exit_code_3(qexport, bundle):
    code, out, err = qexport("validate", bundle, "--max-error", "1e-4")
    assert code == 3
    assert "FAILED: output 'hidden' with the library" in out
    assert "first site over the limit: encoder.0.attention" in out
    assert err == ""


def test_the_next_command_can_be_pasted(qexport, bundle, tmp_path):
    target = tmp_path / "my bundle"
    _, out, _ = qexport("convert", bundle / "classical.onnx", "-o", target)
    assert shlex.split(out.splitlines()[-1]) == ["next:", "qexport", "validate", str(target)]


def test_dry_run_writes_nothing(qexport, bundle, tmp_path):
    code, out, err = qexport("convert", bundle / "classical.onnx", "--dry-run", "-o", tmp_path / "never")
    assert code == 0, err
    assert "2 of 2 attentions would be converted" in out
    assert list(tmp_path.iterdir()) == []


# The command, which says when the new bundle lies half-written beside the old one, and waits there.
SLOW_CONVERT = """
import time
from qexport import conversion
from qexport.cli import main
write_models = conversion.write_models

def slow(*args):
    write_models(*args)
    print("half", flush=True)
    time.sleep(600)

conversion.write_models = slow
main()
"""


def test_interrupt_leaves_the_old_bundle(bundle, tmp_path):
    """Ctrl-C while a bundle is being replaced: exit code 130, the old one byte for byte, nothing beside it."""
    target = make_bundle(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in target.iterdir() if p.is_file()}
    command = [sys.executable, "-P", "-c", SLOW_CONVERT, "convert", bundle / "classical.onnx", "-o", target]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "half\n", running.communicate()[1]
    assert len(os.listdir(tmp_path)) == 2
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGINT, out + err
    assert err.strip().count("\n") == 0  # click starts a new line after the terminal's ^C
    assert {p.name: p.read_bytes() for p in target.iterdir() if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_doctor(qexport):
    code, out, _ = qexport("doctor", "--json")
    assert code == 0
    subjects = {f["subject"] for f in json.loads(out)["findings"]}
    assert subjects >= {"python", "onnxruntime", "op library", "kernel", "CUDA", "[qiskit]", "[pennylane]"}


def test_ops(qexport):
    code, out, _ = qexport("ops", "--json")
    assert code == 0
    assert json.loads(out)["ops"][0]["name"] == "QuantumAttention"
    assert "num_samples" in qexport("ops")[1]
