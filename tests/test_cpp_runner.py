"""The C++ runner of a deployment: built as its users build it, equal to Python to the last bit, and never crashing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundle_factory import make_bundle
from onnx import helper

from qexport import installed
from qexport.deployment import pack_deployment
from qexport.deployment.library import LIBRARY, this_target

TIMEOUT = 300
TYPES = ["float32", "float64", "float16", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
pytestmark = pytest.mark.skipif(this_target() is None, reason="deployments run on Linux, x86_64 and aarch64")


def run(*command, **options):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=TIMEOUT, **options)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runner")
    make_bundle(folder / "bundle")
    pack_deployment(folder / "bundle", folder / "device")
    return folder / "device"


@pytest.fixture(scope="module")
def runner(packed, tmp_path_factory):
    """The program, built from the sources that were packed."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} on this machine")
    build = tmp_path_factory.mktemp("build")
    strict = "-DCMAKE_CXX_FLAGS=-Werror"
    done = run("cmake", "-S", packed / "cpp", "-B", build, strict, f"-DPython_EXECUTABLE={sys.executable}")
    if done.returncode and "give pip access to a package index" in done.stderr:
        pytest.skip("no headers of onnxruntime here, and the package registry is out of reach")
    assert done.returncode == 0, done.stderr
    done = run("cmake", "--build", build)
    assert done.returncode == 0, done.stdout
    return build / "qexport_runner"


def refused(done, code: int) -> str:
    """The one line that a run ended with."""
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done.stdout + done.stderr
    return done.stderr


def test_output_equals_pythons(packed, runner, tmp_path):
    done = run(runner, packed, "--runs", 3, "--threads", 1, "--save", tmp_path / "cpp" / "new")
    assert (done.returncode, done.stderr) == (0, "")
    assert "output hidden: relative error 0, allowed 0.05" in done.stdout
    assert "3 runs" in done.stdout
    assert done.stdout.endswith("PASSED\n")
    assert run(sys.executable, packed / "run.py", "--save", tmp_path / "python").returncode == 0
    assert (tmp_path / "cpp" / "new" / "output_0.npy").read_bytes() == (tmp_path / "python" / "output_0.npy").read_bytes()


@pytest.fixture
def identity(tmp_path):
    """A folder like a deployment whose model returns its inputs, one of each type, with extreme values and odd shapes."""
    names = [f"x_{name}" for name in TYPES]
    values = {}
    for name in TYPES:
        kind = np.dtype(name)
        if kind.kind == "f":
            limits = np.finfo(kind)
            flat = [0.0, -1.5, limits.max, limits.min, limits.tiny, limits.smallest_subnormal, np.inf, np.nan]
        else:
            flat = [0, 1] * 4 if kind.kind == "b" else [0, 1, np.iinfo(kind).max, np.iinfo(kind).min] * 2
        values[name] = np.array(flat, kind).reshape(2, 1, 4)
    values["int64"], values["int8"] = np.array(7), np.zeros((3, 0), np.int8)  # a scalar, and nothing at all
    types = {name: helper.np_dtype_to_tensor_dtype(np.dtype(name)) for name in TYPES}
    ends = [
        [helper.make_tensor_value_info(f"{side}_{name}", types[name], values[name].shape) for name in TYPES] for side in "xy"
    ]
    nodes = [helper.make_node("Identity", [name], [name.replace("x_", "y_")]) for name in names]
    graph = helper.make_graph(nodes, "identity", *ends)
    folder = tmp_path / "identity"
    (folder / "samples").mkdir(parents=True)
    (folder / "lib").mkdir()
    shutil.copyfile(installed.get_library_path(), folder / "lib" / LIBRARY)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    for k, name in enumerate(TYPES):
        for side in ("input", "output"):
            np.save(folder / "samples" / f"{side}_{k}.npy", values[name])
    np.save(folder / "samples" / "tolerance.npy", np.array(0.0))
    return folder


def test_every_type_comes_and_goes(identity, runner, tmp_path):
    done = run(runner, identity, "--runs", 1, "--save", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for k in range(len(TYPES)):
        stored = identity / "samples" / f"output_{k}.npy"
        assert (tmp_path / f"output_{k}.npy").read_bytes() == stored.read_bytes(), TYPES[k]


@pytest.mark.parametrize("name", [name for name in TYPES if name not in ("int8", "int64")])
def test_errors_are_those_that_python_measures(identity, runner, name):
    """One element is off; the tolerance, just above and just below the error, is what both agree about."""
    from qexport.deployment.run import relative_error

    k = TYPES.index(name)
    file = identity / "samples" / f"output_{k}.npy"
    value, small = np.load(file), np.load(file)
    small[...] = np.resize(np.array([1, 0, 1, 1], small.dtype), small.shape)
    np.save(identity / "samples" / f"input_{k}.npy", small)
    value[...] = small
    value[0, 0, 1] = 1
    np.save(file, value)
    error = relative_error(small, value)
    assert 0 < error < 1
    for factor, code in ((1.001, 0), (0.999, 3)):
        np.save(identity / "samples" / "tolerance.npy", np.array(error * factor))
        assert run(runner, identity, "--runs", 1).returncode == code
    np.save(file, value.astype("float32" if name != "float32" else "float64"))
    done = run(runner, identity, "--runs", 1)
    assert (done.returncode, f"output y_{name}: relative error inf" in done.stdout) == (3, True)


def test_usage(packed, runner):
    for arguments, says in (
        ([], "DIR is missing"),
        ([packed, packed], "one folder only"),
        ([packed, "--runs"], "--runs takes a value"),
        ([packed, "--runs", "0"], "from 1 to 1000000, got '0'"),
        ([packed, "--runs", "ten"], "got 'ten'"),
        ([packed, "--threads", "99999999999999999999"], "got '99999999999999999999'"),
        ([packed, "--provider", "tpu"], "no option --provider tpu"),
    ):
        assert says in refused(run(runner, *arguments), 2)


@pytest.fixture
def damaged(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "damaged"))


def npy(file: Path, header: bytes, data: bytes = b"", version: int = 1) -> None:
    file.write_bytes(b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(2, "little") + header + data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: shutil.rmtree(f), "cannot be read; DIR is the folder"),
        (lambda f: (f / "model.onnx").write_bytes(b"no model"), "error: "),
        (lambda f: (f / "lib" / LIBRARY).write_bytes(b"no library"), LIBRARY),
        (lambda f: shutil.rmtree(f / "samples"), "input_0.npy: cannot be read"),
        (lambda f: (f / "samples" / "input_0.npy").write_bytes(b""), "not an .npy file"),
        (lambda f: (f / "samples" / "input_0.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\xff"), "cut short"),
        (lambda f: npy(f / "samples" / "input_0.npy", b"{}", version=3), "of version 1.0"),
        (lambda f: npy(f / "samples" / "input_0.npy", b"{'descr': '|O', 'shape': ()}"), "header is not"),
        (lambda f: np.save(f / "samples" / "input_0.npy", np.ones((2, 12)).T), "Fortran order"),
        (lambda f: np.save(f / "samples" / "input_0.npy", np.ones((2, 12), ">i8")), "type >i8 are not supported"),
        (lambda f: np.save(f / "samples" / "input_0.npy", np.ones((2, 12), complex)), "type <c16 are not supported"),
        (lambda f: np.save(f / "samples" / "input_0.npy", np.ones((2, 12), np.float32)), "Unexpected input data type"),
        (lambda f: np.save(f / "samples" / "input_0.npy", np.ones(12, np.int64)), "error: "),
        (lambda f: np.save(f / "samples" / "input_0.npy", np.full((2, 12), 10**9)), "error: "),
        (lambda f: np.save(f / "samples" / "tolerance.npy", np.zeros(2)), "tolerance.npy is not one float64"),
        (
            lambda f: npy(
                f / "samples" / "input_0.npy",
                b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999, 99999999, 99999999), }\n",
            ),
            "is too large",
        ),
        (
            lambda f: npy(
                f / "samples" / "input_0.npy", b"{'descr': '<i8', 'fortran_order': False, 'shape': (2, 12), }\n", b"12345678"
            ),
            "holds 8 bytes of data, its shape needs 192",
        ),
    ],
)
def test_one_line_says_what_is_wrong(damaged, runner, damage, says):
    damage(damaged)
    assert says in refused(run(runner, damaged), 1)


def test_a_provider_that_is_not_there(packed, runner):
    done = run(runner, packed, "--provider", "cuda")
    if done.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert "cuda" in refused(done, 1).lower()  # the rest is the words of that onnxruntime


def test_a_place_to_save_that_is_none(packed, runner, tmp_path):
    (tmp_path / "file").touch()
    assert "file" in refused(run(runner, packed, "--save", tmp_path / "file" / "nowhere"), 1)
    (tmp_path / "output_0.npy").mkdir()
    assert "output_0.npy: cannot be written" in refused(run(runner, packed, "--save", tmp_path), 1)


def test_no_damaged_sample_crashes_it(damaged, runner):
    """A sample with one byte changed or cut short: it may run and give other outputs, but a signal ends no run."""
    file = damaged / "samples" / "input_0.npy"
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for k in range(24):
        at = int(rng.integers(0, 128 if k % 2 else len(content)))  # the header is the first 128 bytes
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(changed) if k % 3 else content[:at])
        done = run(runner, damaged, "--runs", 1, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode in (0, 1, 3), (at, done.returncode)
        assert done.stderr.count("\n") == (done.returncode == 1)
