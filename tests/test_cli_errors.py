"""What the command line says to wrong usage, bad files and bad data: one line, and the exit code."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
from bundle_factory import make_bundle
from cli_cases import assert_one_line


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("cli") / "bundle")


@pytest.fixture(scope="module")
def classical(bundle):
    return bundle / "classical.onnx"


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
        (["convert", "model.onnx", "-o", "x", "--error-tolerance", "5"], ["5 is 500 %", "write 5% or 0.05"]),
        (["validate", "x", "--max-error", "5"], ["5 is 500 %", "write 5% or 0.05"]),
        (["convert", "model.onnx", "-o", "x", "--error-tolerance", "500%"], ["error_tolerance", "5", "0.01 for 1 %"]),
        (
            ["convert", "m.onnx", "-o", "x", "--strategy", "naive", "--error-tolerance", "0.1"],
            ["naive", "needs strategy tree"],
        ),
        (
            ["convert", "m.onnx", "-o", "x", "--strategy", "exact", "--num-samples", "4"],
            ["num_samples needs strategy naive, stratified, adaptive, hybrid or tree, got exact"],
        ),
        (["convert", "model.onnx", "-o", "x", "--error-tolerance", "some"], ["'some'", "0.01 or 1%"]),
        (["convert", "m.onnx", "-o", "x", "--control-variate"], ["control_variate needs strategy naive", "got tree; leave"]),
        (["convert", "m.onnx", "-o", "x", "--kv-cache", "64", "--opset", "22"], ["needs opset 24, got 22; leave opset out"]),
        (["tune", "x", "--max-error", "1%", "--threads", "99999"], ["threads must be at most", "got 99999; lower it"]),
        (["tune", "x"], ["--max-error"]),
        (["tune", "x", "--max-error", "nan"], ["max_error", "nan", "0.01 for 1 %"]),
        (["tune", "x", "--max-error", "1%", "--time", "0"], ["time", "0.0"]),
        (["convert", "model.onnx", "-o", "x", "--opset", "11"], ["11", "17"]),
        *(
            ([*argv, "--seed", str(2**63)], ["must be a whole number of 64 bits, -2^63 to 2^63 - 1", str(2**63)])
            for argv in (["convert", "m.onnx", "-o", "x"], ["attention", "x", "-o", "y"])
        ),
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
    assert_one_line(*qexport("validate", bundle, "--data", tmp_path / "data.csv"), ".npz")


def test_no_room_for_the_output(bundle):
    command = [sys.executable, "-m", "qexport", "inspect", bundle, "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert_one_line(done.returncode, "", done.stderr, "no room is left where the output goes")


@pytest.mark.parametrize("command", ["validate", "profile", "inspect", "tune --max-error 1%"])
def test_no_bundle_there(qexport, command, tmp_path):
    assert_one_line(*qexport(*command.split(), tmp_path / "nothing"), "no such")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("validate {file}", "{file}: a file, not a bundle"),
        ("validate {empty}", "{empty}: not a bundle"),
        ("validate {bundle} --library {missing}", "{missing}: no such op library; give a"),
        ("bundle {bundle} -o {out} --library {missing}", "{missing}: no such file; give --library"),
        ("bundle {bundle} -o {out} --library {file}", "{file} is no ELF file; give --library"),
        ("verify-bundle {file}", "{file}: a file, not a deployment; give the folder"),
        ("verify-bundle {missing}", "{missing}: no such folder; pack"),
        ("convert {missing} -o {out}", "{missing}: no such file or folder"),
        ("convert {empty} -o {out}", "{empty}: no config.json"),
        ("convert {file} -o {out}", "{file}: unknown kind of file"),
        ("compare {missing} {file}", "{missing}: cannot be read"),
        ("compare {file} {file}", "{file}: not a JSON document"),
        ("scaling --activations {missing}", "{missing}: No such file"),
        ("convert {bundle}/classical.onnx -o {out} --config {missing}", "{missing}: cannot read the recipe: No such file"),
        ("compress {bundle} -o {out} --findings {file}", "{file}: a file is there, findings need a folder"),
        ("report {bundle} -o {out}.html --skip all --data {missing}", "{missing}: no such data file"),
    ],
)
def test_a_path_that_is_missing_or_is_something_else_is_exit_code_1(qexport, bundle, tmp_path, command, words):
    places = {name: tmp_path / name for name in ("file", "empty", "missing", "out")} | {"bundle": bundle}
    places["file"].write_text("nothing that anything reads")
    places["empty"].mkdir()
    argv = [word.format(**places) for word in command.split()]
    assert_one_line(*qexport(*argv), words.format(**places))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_a_bundle_is_not_written_over_itself(qexport, bundle, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(bundle)
    monkeypatch.chdir(bundle)
    for command in ("compress", "tune --max-error 1%"):
        for place in (bundle, f"{bundle}/", tmp_path / "link", "."):
            found = qexport(*command.split(), bundle, "-o", place)
            assert_one_line(*found, "is made from what is there; choose another folder", expected=2)


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
