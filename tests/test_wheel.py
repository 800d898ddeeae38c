"""The wheel in a clean environment: no torch, only the base dependencies and onnxruntime."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from bundle_factory import make_bundle
from test_library import elf_symbols

ROOT = Path(__file__).parent.parent
WHEEL_SIZE = ROOT / ".ci" / "wheel_size.py"
TIMEOUT = 900


def run(*command, **kwargs):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=TIMEOUT, **kwargs)


def pip(python, *arguments):
    """Run pip. Where it fails, its words do not tell whether the package registry is out of reach; a look there does."""
    done = run(python, "-m", "pip", *arguments)
    if done.returncode and run(python, "-m", "pip", "index", "versions", "onnxruntime").returncode:
        pytest.skip("the package registry is out of reach")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The one that QEXPORT_TEST_WHEEL names, or one built here."""
    folder = tmp_path_factory.mktemp("wheel")
    if built := os.environ.get("QEXPORT_TEST_WHEEL"):
        return Path(shutil.copy(built, folder))
    pip(sys.executable, "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """A fresh environment with the wheel and onnxruntime."""
    folder = tmp_path_factory.mktemp("clean")
    assert run(sys.executable, "-m", "venv", folder).returncode == 0
    interpreter = folder / "bin" / "python"
    pip(interpreter, "install", "-q", f"{wheel}[cpu]")
    return interpreter


def test_wheel_holds_the_library_and_no_sources(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "qexport/lib/libqexport_ops.so" in names
    assert any(name.startswith("qexport/_core.") for name in names)
    assert "qexport/demo_sentences.txt" in names
    assert "qexport/attention/page.html" in names
    packed = [name for name in names if name.startswith("qexport/deployment/cpp/")]  # what deployments are built from
    assert {name.rpartition("/")[2] for name in packed} >= {"CMakeLists.txt", "runner.cc", "FindOnnxRuntimeLibrary.cmake"}
    others = set(names) - set(packed)
    unwanted = [name for name in others if name.startswith(("tests/", "cpp/", "bench/"))]
    assert not unwanted + [name for name in others if name.endswith((".cc", ".h", ".a"))]


def test_wheel_is_small(wheel, tmp_path):
    done = run(sys.executable, WHEEL_SIZE, wheel.parent)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^qexport-\S+\.whl: \d+\.\d\d MB$", done.stdout, re.M)

    # and one that is not is found: bytes that nothing compresses
    for name, file, part in (
        ("a", "qexport/extra.bin", "the rest"),
        ("b", "qexport/lib/libqexport_ops_cuda.so", "libqexport"),
    ):
        (tmp_path / name).mkdir()
        shutil.copy(wheel, tmp_path / name)
        with zipfile.ZipFile(tmp_path / name / wheel.name, "a") as archive:
            archive.writestr(file, os.urandom(13 << 20))
        done = run(sys.executable, WHEEL_SIZE, tmp_path / name)
        assert done.returncode == 1
        assert re.search(rf"{part}\S* takes \d+\.\d\d MB, at most \d+\.\d\d MB are allowed", done.stderr)
    (tmp_path / "none").mkdir()
    assert "no wheel" in run(sys.executable, WHEEL_SIZE, tmp_path / "none").stderr


def test_wheel_needs_what_every_linux_has(wheel):
    """What auditwheel asks of a manylinux wheel, but for the versions of symbols, which are the building machine's."""
    allowed = {
        "libc",
        "libm",
        "libdl",
        "librt",
        "libpthread",
        "libgcc_s",
        "libstdc++",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                archive.extract(name, wheel.parent)
                _, needed = elf_symbols(wheel.parent / name)
                assert {library.split(".so")[0] for library in needed} <= allowed, name


def test_no_torch_there(python):
    done = run(python, "-c", "import torch")
    assert "ModuleNotFoundError" in done.stderr


def test_doctor_is_content(python, tmp_path):
    done = run(python, "-m", "qexport", "doctor", "--json", cwd=tmp_path)
    findings = {f["subject"]: f for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0, done.stdout
    assert findings["kernel"]["state"] == "ok"
    assert findings["[export]"]["state"] == "note"
    assert "pip install" in findings["[export]"]["mend"]


def test_a_finished_bundle_is_validated_and_profiled(python, tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    for command in (("validate", "--seeds", "3"), ("profile", "--runs", "3", "--seq", "16"), ("inspect",)):
        done = run(python, "-m", "qexport", command[0], bundle, *command[1:], "--json", cwd=tmp_path)
        assert done.returncode in (0, 3 if command[0] == "validate" else 0), done.stderr
        assert json.loads(done.stdout)


def test_lengths_are_swept_without_torch(python, tmp_path):
    command = ["scaling", "--lengths", "16,64", "--heads", "1", "--json"]
    done = run(python, "-m", "qexport", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    names = {contender["name"] for contender in report["contenders"]}
    assert {"exact fp32", "stratified 32", "MultiHeadAttention"} <= names
    reasons = {one["name"]: one["reason"] for one in report["left_out"]}
    assert reasons["SDPA"] == "torch is not installed: pip install torch"
    done = run(python, "-m", "qexport", *command, "--plot", "scaling.png", cwd=tmp_path)
    assert done.returncode == 1
    assert "pip install 'qexport[plot]'" in done.stderr


def test_a_session_needs_four_lines(python, tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    code = f"""
import numpy as np, onnxruntime, qexport, sys
options = onnxruntime.SessionOptions()
options.register_custom_ops_library(qexport.get_library_path())
session = onnxruntime.InferenceSession({str(bundle / "model.onnx")!r}, options, providers=["CPUExecutionProvider"])
assert qexport.session({str(bundle)!r}).get_inputs()
assert not {{"torch", "onnxscript", "pydantic", "rich"}} & set(sys.modules)
"""
    done = run(python, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_converting_a_torch_model_says_what_to_install(python, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    done = run(python, "-m", "qexport", "convert", "model", "-o", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install" in done.stderr
