"""libqexport_ops.a: a program that links it runs the ops without any op library, and nothing in it collides."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cpu_sessions import cpu_session
from onnx import TensorProto, helper

from qexport.ops.proto import make_node

ROOT = Path(__file__).parent.parent
SOURCES = ("CMakeLists.txt", "cmake", "cpp", "custom_ops")
SHAPES = {"Q": (1, 2, 24, 8), "K": (1, 2, 40, 8), "V": (1, 2, 40, 8)}

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cmake") is None or shutil.which("c++") is None,
    reason="needs Linux, cmake and a C++ compiler",
)


def run(*command):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=1800)


def built_archive():
    """The archive that the installation of this tree left behind, or None where a source is newer."""
    sources = [path for name in SOURCES for path in [ROOT / name, *(ROOT / name).rglob("*.*")] if path.is_file()]
    newest = max(path.stat().st_mtime for path in sources if "cuda" not in path.parts)
    found = [path for path in ROOT.glob("build/*/custom_ops/libqexport_ops.a") if path.stat().st_mtime >= newest]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """examples/static_registration and the archive in it, which is compiled first where there is none: minutes."""
    build, archive = tmp_path_factory.mktemp("static"), built_archive()
    options = [f"-DQEXPORT_ARCHIVE={archive or ''}", f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_CXX_FLAGS=-Werror"]
    done = run("cmake", "-S", ROOT / "examples" / "static_registration", "-B", build, *options)
    if done.returncode and "give pip access to a package index" in done.stderr:
        pytest.skip("no headers of onnxruntime here, and the package registry is out of reach")
    assert done.returncode == 0, done.stderr
    done = run("cmake", "--build", build, "--parallel")
    assert done.returncode == 0, done.stdout + done.stderr
    return build / "static_registration", archive or build / "qexport" / "custom_ops" / "libqexport_ops.a"


@pytest.fixture
def model(tmp_path):
    """One node that draws its samples, and no function that could stand in for the op."""
    node = make_node("QuantumAttention", ["Q", "K", "V"], ["Y"], strategy="stratified", num_samples=5)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items()]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("Y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.qexport", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_the_program_runs_the_ops_that_are_in_it(program, model, tmp_path):
    rng = np.random.default_rng(3)
    feeds = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in SHAPES.items()}
    (tmp_path / "inputs").write_bytes(b"".join(value.tobytes() for value in feeds.values()))
    done = run(program[0], model, tmp_path / "inputs", tmp_path / "output")
    assert (done.returncode, done.stderr) == (0, "")

    (expected,) = cpu_session(model.read_bytes()).run(None, feeds)
    assert (tmp_path / "output").read_bytes() == expected.tobytes()
    with pytest.raises(Exception, match=r"com\.qexport"):  # and the model needs them
        ort.InferenceSession(model, providers=["CPUExecutionProvider"])


def test_what_is_wrong_is_one_line(program, model, tmp_path):
    (tmp_path / "inputs").write_bytes(bytes(7))
    done = run(program[0], model, tmp_path / "inputs", tmp_path / "output")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "does not hold the model's inputs" in done.stderr
    assert not (tmp_path / "output").exists()


def test_the_archive_defines_one_name_outside_of_its_namespace(program):
    """So it links beside other op libraries, whose function is RegisterCustomOps, and beside another Eigen."""
    done = run("nm", "--extern-only", "--defined-only", "--format=posix", program[1])
    assert done.returncode == 0, done.stderr
    strong = {name for name, kind in re.findall(r"^(\S+) ([A-Z]) ", done.stdout, re.M) if kind not in "VW"}
    assert {name for name in strong if not re.match(r"_Z\w*?7qexport", name)} == {"RegisterQexportOps"}
