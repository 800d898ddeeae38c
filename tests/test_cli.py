"""The command line as a user meets it: exit codes, one-line errors, clean JSON, quick help."""

import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from importlib import import_module

import numpy as np
import onnx
import pytest
from bundle_factory import build_model, make_bundle

from qexport.cli import COMMANDS, Place
from qexport.cli.render import show_sites


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("cli") / "bundle")


@pytest.fixture(scope="module")
def classical(tmp_path_factory):
    """A classical .onnx file with two attentions."""
    path = tmp_path_factory.mktemp("cli") / "encoder.onnx"
    onnx.save(build_model(quantum=False), path)
    return path


def assert_one_line(code, out, err, *words, expected=1):
    assert code == expected, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("qexport: error: ")
    for word in words:
        assert word in err


def test_help_of_every_command(qexport):
    code, out, _ = qexport("--help")
    assert code == 0
    for name in COMMANDS:
        assert name in out
        code, text, _ = qexport(name, "--help")
        assert code == 0
        assert "--json" in text or name == "completion"  # whose answer is a script


def processor_time(call):
    """Median of five, in seconds, of what the processes that a call starts compute: what else runs here is not in it."""
    times = []
    for _ in range(5):
        before = os.times()
        call()
        after = os.times()
        times.append(sum(after[2:4]) - sum(before[2:4]))  # of children, in their code and in the system's
    return statistics.median(times)


def test_help_is_quick():
    command = [sys.executable, "-P", "-m", "qexport", "--help"]
    assert 0 < processor_time(lambda: subprocess.run(command, check=True, capture_output=True)) < 0.3


def complete(*words):
    """What bash is offered for the last word: [(kind, value)]."""
    env = os.environ | {
        "_QEXPORT_COMPLETE": "bash_complete",
        "COMP_WORDS": shlex.join(["qexport", *words]),
        "COMP_CWORD": str(len(words)),
    }
    code = "from qexport.cli import main; main()"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return [tuple(line.split(",", 1)) for line in done.stdout.splitlines()]


def test_the_shell_completes_commands_options_choices_and_paths():
    assert complete("") == [("plain", name) for name in COMMANDS]
    assert complete("comp") == [("plain", "compress"), ("plain", "compare"), ("plain", "completion")]
    assert complete("--ver") == [("plain", "--version")]
    assert complete("convert", "m", "--error") == [("plain", "--error-tolerance")]
    assert complete("convert", "m", "--strategy", "st") == [("plain", "stratified")]
    assert complete("completion", "") == [("plain", shell) for shell in ("bash", "zsh", "fish")]
    assert complete("validate", "some/fol") == [("dir", "some/fol")]
    assert complete("validate", "d", "--data", "te") == [("file", "te")]


def test_every_path_of_every_command_is_completed():
    """Parameters that are shown as a file or a folder, or hold one, are of a type that the shell knows."""
    shown = {"DIR", "FILE", "FOLDER", "PATH", "OUT"}
    named = {"bundle", "deployment", "model", "path", "data", "output"}
    for name in COMMANDS:
        for param in import_module(f"qexport.cli.{name.replace('-', '_')}").command.params:
            if param.metavar in shown or param.type.name in shown or param.name in named:
                assert isinstance(param.type, Place), f"{name} {param.name}"


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash on this machine")
def test_the_script_of_bash_works_in_bash(qexport, tmp_path):
    code, script, _ = qexport("completion", "bash")
    assert code == 0
    (tmp_path / "qexport").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m qexport "$@"\n')
    (tmp_path / "qexport").chmod(0o755)
    script += (
        "\ncomplete -p qexport; COMP_WORDS=(qexport con); COMP_CWORD=1; _qexport_completion qexport; echo ${COMPREPLY[@]}"
    )
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[0].endswith("-F _qexport_completion qexport"), done.stderr
    assert done.stdout.splitlines()[1] == "convert"
    for shell in ("zsh", "fish"):
        code, script, _ = qexport("completion", shell)
        assert code == 0
        assert f"_QEXPORT_COMPLETE={shell}_complete" in script


@pytest.mark.parametrize("words", [("co",), ("convert", "m", "--strategy", ""), ("scaling", "--")])
def test_completion_is_quick(words):
    """A user waits for it at every tab."""
    assert complete(*words)
    assert 0 < processor_time(lambda: complete(*words)) < 0.3


def test_convert_validate_profile_inspect(qexport, classical, tmp_path):
    target = tmp_path / "bundle"
    code, out, err = qexport("convert", classical, "-o", target, "--error-tolerance", "2%", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [(site["strategy"], site["error_tolerance"]) for site in report["sites"]] == [("tree", 0.02)] * 2
    code, out, err = qexport("validate", target, "--max-error", "2", "--json")
    assert code == 0, err
    assert json.loads(out)["passed"] is True
    code, out, err = qexport("profile", target, "--runs", "3", "--seq", "8,16", "--json")
    assert code == 0, err
    assert [size["sequence"] for size in json.loads(out)["sizes"]] == [8, 16]
    code, out, err = qexport("inspect", target, "--json")
    assert code == 0, err
    assert len(json.loads(out)["attention"]) == 2


def test_text_output(qexport, bundle):
    code, out, _ = qexport("validate", bundle, "--max-error", "2")
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


def test_dry_run_writes_nothing(qexport, classical, tmp_path):
    code, out, err = qexport("convert", classical, "--dry-run", "-o", tmp_path / "never")
    assert code == 0, err
    assert "2 of 2 attentions would be converted" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["no-such-command"], ["no command 'no-such-command'", "convert"]),
        (["convert", "model.onnx"], ["-o DIR"]),
        (["convert", "model.onnx", "-o", "x", "--num-samples", "0"], ["must be >= 1, got 0"]),
        (["convert", "model.onnx", "-o", "x", "--num-samples", "-3"], ["must be >= 1, got -3"]),
        (["convert", "model.onnx", "-o", "x", "--num-samples", "some"], ["'some' is not a whole number"]),
        (["convert", "model.onnx", "-o", "x", "--strategy", "best"], ["'best'", "stratified"]),
        (["convert", "model.onnx", "-o", "x", "--precision", "fp8"], ["'fp8'", "bf16"]),
        (["convert", "model.onnx", "-o", "x", "--error-tolerance", "5"], ["error_tolerance", "5", "0.01 for 1 %"]),
        (
            ["convert", "m.onnx", "-o", "x", "--strategy", "naive", "--error-tolerance", "0.1"],
            ["naive", "needs strategy tree"],
        ),
        (["convert", "model.onnx", "-o", "x", "--error-tolerance", "some"], ["'some'", "0.01 or 1%"]),
        (["tune", "x"], ["--max-error"]),
        (["tune", "x", "--max-error", "nan"], ["max_error", "nan", "0.01 for 1 %"]),
        (["tune", "x", "--max-error", "1%", "--time", "0"], ["time", "0.0"]),
        (["convert", "model.onnx", "-o", "x", "--opset", "11"], ["11", "17"]),
        (["profile", "x", "--runs", "0"], ["0", "1"]),
        (["validate", "x", "--seeds", "many"], ["many"]),
    ],
)
def test_wrong_usage_is_exit_code_2(qexport, argv, words):
    code, out, err = qexport(*argv)
    assert code == 2
    assert out == ""
    for word in words:
        assert word in err


def damaged(kind, tmp_path, classical):
    """A file that is wrong in the way of `kind`, and what the error must say."""
    path = tmp_path / f"{kind}.onnx"
    if kind == "missing":
        return path, ["no such"]
    if kind == "text":
        path.write_text("this is not a model\n")
        return path, ["not an ONNX"]
    if kind == "empty":
        path.write_bytes(b"")
        return path, ["not an ONNX"]
    if kind == "truncated":
        path.write_bytes(classical.read_bytes()[:-3000])
        return path, ["cut short"]
    model = onnx.load(classical)
    if kind == "unknown_op":
        model.graph.node[-1].domain = "com.nobody"
        model.graph.node[-1].op_type = "Mystery"
        model.opset_import.append(onnx.helper.make_opsetid("com.nobody", 1))
        words = ["com.nobody", "Mystery"]
    elif kind == "no_attention":
        model = onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
        )
        words = ["no attention found"]
    elif kind == "external_missing":
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        (tmp_path / "weights.bin").unlink()
        return path, ["weights.bin"]
    elif kind == "external_outside":
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../outside.bin"
        (tmp_path.parent / "outside.bin").write_bytes((tmp_path / "weights.bin").read_bytes())
        path.write_bytes(model.SerializeToString())
        return path, ["outside"]
    path.write_bytes(model.SerializeToString())
    return path, words


@pytest.mark.parametrize(
    "kind",
    ["missing", "text", "empty", "truncated", "unknown_op", "no_attention", "external_missing", "external_outside"],
)
def test_convert_of_a_bad_file(qexport, kind, tmp_path, classical):
    path, words = damaged(kind, tmp_path, classical)
    assert_one_line(*qexport("convert", path, "-o", tmp_path / "out"), path.name, *words)
    assert not (tmp_path / "out").exists()
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"input_ids": np.zeros((1, 5), np.float32), "attention_mask": np.ones((1, 5), np.int64)}, ["input_ids", "float32"]),
        ({"input_ids": np.zeros((1, 65), np.int64), "attention_mask": np.ones((1, 65), np.int64)}, ["65", "64"]),
        ({"input_ids": np.zeros((0, 5), np.int64), "attention_mask": np.ones((0, 5), np.int64)}, ["empty"]),
        ({"input_ids": np.full((1, 5), 50), "attention_mask": np.ones((1, 5), np.int64)}, ["input_ids", "50"]),
        ({"ids": np.zeros((1, 5), np.int64)}, ["ids", "input_ids"]),
    ],
)
def test_validate_with_bad_data(qexport, bundle, tmp_path, arrays, words):
    np.savez(tmp_path / "data.npz", **arrays)
    assert_one_line(*qexport("validate", bundle, "--data", tmp_path / "data.npz"), *words)


def test_data_of_an_unknown_kind(qexport, bundle, tmp_path):
    (tmp_path / "data.csv").write_text("1,2\n")
    assert_one_line(*qexport("validate", bundle, "--data", tmp_path / "data.csv"), ".npz", expected=2)


@pytest.mark.parametrize("command", ["validate", "profile", "inspect", "tune --max-error 1%"])
def test_no_bundle_there(qexport, command, tmp_path):
    assert_one_line(*qexport(*command.split(), tmp_path / "nothing"), "no such")


def test_sequence_longer_than_the_model(qexport, bundle):
    code, out, err = qexport("profile", bundle, "--seq", "65")
    assert_one_line(code, out, err, "65", "64", expected=code)
    assert code in (1, 2)


def test_recipe_errors_name_the_file_and_the_key(qexport, classical, tmp_path):
    (tmp_path / "recipe.yaml").write_text("strategy: stratified\nsamples: 3\n")
    code, out, err = qexport("convert", classical, "-o", tmp_path / "out", "--config", tmp_path / "recipe.yaml")
    assert_one_line(code, out, err, "recipe.yaml", "samples", expected=2)


def test_an_existing_folder_is_not_overwritten(qexport, classical, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    code, out, err = qexport("convert", classical, "-o", tmp_path / "mine")
    assert_one_line(code, out, err, "mine", expected=code)
    assert code in (1, 2)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


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


def test_interrupt_leaves_the_old_bundle(classical, tmp_path):
    """Ctrl-C while a bundle is being replaced: exit code 130, the old one byte for byte, nothing beside it."""
    target = make_bundle(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in target.iterdir() if p.is_file()}
    command = [sys.executable, "-P", "-c", SLOW_CONVERT, "convert", classical, "-o", target]
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
