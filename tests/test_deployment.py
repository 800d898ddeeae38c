"""Deployments: all that a device needs, and whatever was changed in one is found and named."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bundle_factory import make_bundle
from deployment_cases import AARCH64, X86_64, elf, flip, make_wheel, reseal

from qexport import installed, runtime
from qexport.bundle import MANIFEST, SEAL, Bundle
from qexport.deployment import pack_deployment, verify_deployment
from qexport.deployment.library import LIBRARY, MACHINES, PLUGIN, copy_library, this_target
from qexport.errors import QexportError, UsageError

pytestmark = pytest.mark.skipif(this_target() is None, reason=f"this machine is none of {', '.join(MACHINES)}")
OTHER = next(name for name in MACHINES if name != this_target())
OTHER_MACHINE, OWN_MACHINE = (AARCH64, X86_64) if OTHER.endswith("aarch64") else (X86_64, AARCH64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def packed(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "device"
    pack_deployment(bundle, folder)
    return folder


@pytest.fixture
def deployment(packed, tmp_path):
    """One to damage."""
    return Path(shutil.copytree(packed, tmp_path / "device"))


def fails(function, *arguments, **options) -> str:
    with pytest.raises(QexportError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_packed(bundle, packed):
    files = {p.relative_to(packed).as_posix() for p in packed.rglob("*") if p.is_file()}
    assert {"model.onnx", f"lib/{LIBRARY}", "run.py", "samples/output_0.npy", "cpp/CMakeLists.txt", "cpp/runner.cc"} <= files
    assert not {name for name in files if "classical" in name or PLUGIN in name}
    manifest = json.loads((packed / MANIFEST).read_text())
    assert set(manifest["files"]) == files - {MANIFEST, SEAL}
    assert (manifest["target"], manifest["provider"]) == (this_target(), "cpu")
    assert manifest["min_onnxruntime"] == Bundle.open(bundle).manifest["min_onnxruntime"]
    assert (packed / "model.onnx").read_bytes() == (bundle / "model.onnx").read_bytes()
    assert (packed / "lib" / LIBRARY).read_bytes() == Path(installed.get_library_path()).read_bytes()


def test_the_program_of_the_guide(packed, tmp_path):
    """As a reader would run it, beside the folder OUT."""
    guide = (Path(__file__).parent.parent / "docs" / "deploying.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", guide, flags=re.S)
    (tmp_path / "OUT").symlink_to(packed)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "(1, 16, 16)\n"), done.stderr


def test_stored_outputs_are_those_of_the_sampled_model(bundle, packed):
    """And not the classical ones, which the bundle stores."""
    session = runtime.session(bundle / "model.onnx")
    feed = {spec.name: np.load(packed / "samples" / f"input_{k}.npy") for k, spec in enumerate(session.get_inputs())}
    stored = np.load(packed / "samples" / "output_0.npy")
    np.testing.assert_array_equal(stored, session.run(None, feed)[0])
    classical = runtime.session(bundle / "classical.onnx", library=False).run(None, feed)[0]
    assert np.linalg.norm(stored - classical) > 0.01 * np.linalg.norm(classical)


@pytest.mark.parametrize(
    ("attention", "allowed"),
    [
        ({"strategy": "stratified", "num_samples": [4]}, 0.05),
        ({"strategy": "exact", "precision": "fp32"}, 1e-5),
        ({"strategy": "exact", "precision": "bf16"}, 1e-2),
        ({"strategy": "tree", "error_tolerance": 0.2, "num_samples": [64]}, 0.2),
    ],
)
def test_the_tolerance_is_what_the_recipe_allows(tmp_path, attention, allowed):
    pack_deployment(make_bundle(tmp_path / "bundle", attention=attention), tmp_path / "out")
    assert float(np.load(tmp_path / "out" / "samples" / "tolerance.npy")) == allowed


def test_verified_by_the_command(packed, qexport):
    code, out, err = qexport("verify-bundle", packed)
    assert (code, err) == (0, "")
    assert "all 14 files as they were packed" in out
    assert out.endswith("PASSED\n")
    code, out, _ = qexport("verify-bundle", packed, "--json", "--runs", 3)
    found = json.loads(out)
    assert code == 0
    assert found["run"]["runs"] == 3
    assert found["run"]["errors"] == {"hidden": 0.0}
    assert found["run"]["latency_ms"]["p50"] > 0


def test_a_changed_byte_is_found_wherever_it_is(deployment):
    """In every file, the manifest and its own hash included, at both ends and in the middle."""
    files = sorted(p for p in deployment.rglob("*") if p.is_file())
    assert len(files) == 16
    for file in files:
        content = file.read_bytes()
        for at in {0, len(content) // 2, len(content) - 1}:
            flip(file, at)
            assert f"{file.relative_to(deployment).as_posix()} " in fails(verify_deployment, deployment)
            file.write_bytes(content)
    verify_deployment(deployment, runs=1)


def test_a_missing_file_is_found_whichever_it_is(deployment):
    for file in sorted(p for p in deployment.rglob("*") if p.is_file()):
        content = file.read_bytes()
        file.unlink()
        assert file.relative_to(deployment).as_posix() in fails(verify_deployment, deployment)
        file.write_bytes(content)
    verify_deployment(deployment, runs=1)


def test_what_was_added_is_found(deployment, tmp_path, qexport):
    (deployment / "lib" / PLUGIN).write_bytes(b"loaded by the op library")
    code, out, err = qexport("verify-bundle", deployment)
    assert (code, out) == (1, "")
    assert f"lib/{PLUGIN} was added since it was packed" in err
    assert err.count("\n") == 1
    (deployment / "lib" / PLUGIN).unlink()
    (deployment / "samples" / "more").symlink_to(tmp_path)
    assert "samples/more was added" in fails(verify_deployment, deployment)
    (tmp_path / "model.onnx").write_bytes((deployment / "model.onnx").read_bytes())
    (deployment / "model.onnx").unlink()
    (deployment / "model.onnx").symlink_to(tmp_path / "model.onnx")
    assert "model.onnx is a link, not a file (and 1 more)" in fails(verify_deployment, deployment)


def run_there(folder, *arguments, blocked=("qexport", "onnx", "torch")):
    """run.py in a fresh interpreter that has none of the modules `blocked`."""
    program = f"""
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Block())
sys.argv = {[str(folder / "run.py"), *map(str, arguments)]!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    return subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)


def test_run_py_needs_numpy_and_onnxruntime_alone(packed, tmp_path):
    done = run_there(packed, "--json", "--runs", 2, "--threads", 1, "--save", tmp_path / "saved")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["passed"] is True
    assert found["runs"] == 2
    stored = (packed / "samples" / "output_0.npy").read_bytes()
    assert (tmp_path / "saved" / "output_0.npy").read_bytes() == stored
    done = run_there(packed, blocked=("onnxruntime",))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "run.py: error: No module named 'onnxruntime'; pip install numpy onnxruntime\n"


def test_wrong_outputs_are_out_of_tolerance(deployment, qexport):
    """As if another processor computed something else: sealed again, so that the files are as they should be."""
    file = deployment / "samples" / "output_0.npy"
    np.save(file, np.load(file) * np.float32(1.1))
    reseal(deployment)
    code, out, _ = qexport("verify-bundle", deployment)
    assert code == 3
    assert "output hidden: relative error 0.091, allowed 0.05" in out  # 0.1 / 1.1
    done = run_there(deployment)
    assert done.returncode == 3
    assert "FAILED: the outputs are not the stored ones" in done.stdout
    np.save(file, np.load(file)[:1])
    reseal(deployment)
    code, out, _ = qexport("verify-bundle", deployment, "--json")
    assert (code, json.loads(out)["run"]["errors"]) == (3, {"hidden": None})


@pytest.mark.parametrize(
    ("damage", "arguments", "says"),
    [
        (lambda f: (f / "samples" / "input_1.npy").unlink(), [], "input_1.npy"),
        (lambda f: (f / "model.onnx").write_bytes(b"no model"), [], "model.onnx"),
        (lambda f: (f / "lib" / LIBRARY).write_bytes(b"no library"), [], LIBRARY),
        (lambda f: (f / MANIFEST).write_text("{"), [], "error: "),
        (lambda f: edit_manifest(f, min_onnxruntime="9.1"), [], "is too old, the model needs 9.1"),
        (lambda f: None, ["--provider", "cuda"], "CUDAExecutionProvider"),
    ],
)
def test_run_py_says_in_one_line_what_is_wrong(deployment, damage, arguments, says):
    damage(deployment)
    done = run_there(deployment, *arguments)
    if "cuda" in arguments and done.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert says in done.stderr


def edit_manifest(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


def test_for_another_machine(bundle, tmp_path, qexport):
    """Packed from a wheel or a file; its files are checked here, its outputs are not."""
    sources = (make_wheel(tmp_path / "qexport-other.whl", OTHER_MACHINE), tmp_path / "other.so")
    sources[1].write_bytes(elf(OTHER_MACHINE))
    for source in sources:
        code, _, err = qexport("bundle", bundle, "-o", tmp_path / "out", "--target", OTHER, "--library", source)
        assert (code, err) == (0, "")
        assert (tmp_path / "out" / "lib" / LIBRARY).read_bytes() == elf(OTHER_MACHINE)
        code, out, _ = qexport("verify-bundle", tmp_path / "out")
        assert code == 0
        assert f"the outputs were not checked, since it is for {OTHER}" in out
    flip(tmp_path / "out" / "lib" / LIBRARY, 19)
    assert qexport("verify-bundle", tmp_path / "out")[0] == 1


def test_a_library_that_does_not_fit(bundle, tmp_path, qexport):
    files = {
        "own.so": elf(OWN_MACHINE),
        "text.so": b"not a library",
        "short.so": b"\x7fELF",
        "program.so": elf(OTHER_MACHINE, kind=2),
        "narrow.so": elf(OTHER_MACHINE, bits=1),
        "broken.whl": b"PK",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    make_wheel(tmp_path / "own.whl", OWN_MACHINE)
    make_wheel(tmp_path / "empty.whl", OTHER_MACHINE, names=())
    says = {
        "own.so": f"which does not fit the target {OTHER}",
        "own.whl": f"own.whl: its {LIBRARY} is built for {this_target().partition('-')[2]}, which does not fit",
        "text.so": f"text.so is no ELF file; give --library a wheel of qexport for {OTHER} or a {LIBRARY}",
        "short.so": "is no ELF file",
        "program.so": "is no little-endian shared object of 64 bits",
        "narrow.so": "is no little-endian shared object of 64 bits",
        "broken.whl": "cannot be read as a wheel",
        "empty.whl": f"holds no qexport/lib/{LIBRARY}",
        "missing.so": "no such file",
        "missing.whl": "cannot be read as a wheel",
    }
    for name, words in says.items():
        code, out, err = qexport("bundle", bundle, "-o", tmp_path / "out", "--target", OTHER, "--library", tmp_path / name)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert words in err
        assert str(tmp_path / name) in err
        assert not (tmp_path / "out").exists()


def test_usage(bundle, tmp_path, qexport):
    code, _, err = qexport("bundle", bundle, "-o", tmp_path / "out", "--target", OTHER)
    assert code == 2
    assert f"this installation is for {this_target()}; give --library a wheel of qexport for {OTHER}" in err
    code, _, err = qexport("bundle", bundle, "-o", tmp_path / "out", "--target", "windows-x86_64")
    assert (code, "targets: linux-x86_64, linux-aarch64" in err) == (2, True)
    with pytest.raises(UsageError, match="provider must be cpu or cuda, got 'tpu'"):
        pack_deployment(bundle, tmp_path / "out", provider="tpu")
    assert not (tmp_path / "out").exists()


def test_cuda_needs_its_kernels(bundle, tmp_path):
    library = tmp_path / LIBRARY
    shutil.copyfile(installed.get_library_path(), library)
    assert PLUGIN in fails(pack_deployment, bundle, tmp_path / "out", provider="cuda", library=library)
    alone = make_wheel(tmp_path / "alone.whl", OWN_MACHINE)
    assert PLUGIN in fails(pack_deployment, bundle, tmp_path / "out", provider="cuda", library=alone)
    whole = make_wheel(tmp_path / "whole.whl", OWN_MACHINE, names=(LIBRARY, PLUGIN))
    for number, (given, sent) in enumerate(((library, {LIBRARY}), (alone, {LIBRARY}), (whole, {LIBRARY, PLUGIN}))):
        folder = tmp_path / str(number)
        folder.mkdir()
        copy_library(folder, this_target(), "cuda", given, allow_fallback=True)
        assert {file.name for file in folder.iterdir()} == sent
    (tmp_path / PLUGIN).write_bytes(elf(OTHER_MACHINE))
    assert "does not fit" in fails(pack_deployment, bundle, tmp_path / "out", provider="cuda", library=library)
    (tmp_path / PLUGIN).write_bytes(elf(OWN_MACHINE))  # no plugin that loads: the op library goes without, on the CPU
    manifest = pack_deployment(bundle, tmp_path / "out", provider="cuda", library=library)
    assert manifest["provider"] == "cuda"
    assert f"lib/{PLUGIN}" in manifest["files"]
    assert float(np.load(tmp_path / "out" / "samples" / "tolerance.npy")) == 0.05


def test_bundles_and_deployments_are_told_apart(bundle, packed, tmp_path):
    assert "a deployment, not a bundle" in fails(Bundle.open, packed)
    assert "a bundle, not a deployment" in fails(verify_deployment, bundle)
    assert "no such folder" in fails(verify_deployment, tmp_path / "nowhere")
    assert "a file, not a deployment; give the folder" in fails(verify_deployment, packed / MANIFEST)
    copy = shutil.copytree(bundle, tmp_path / "bundle")
    assert "not empty and holds no deployment" in fails(pack_deployment, bundle, copy)
    assert Bundle.open(copy).changed_files() == []


def test_replaces_a_deployment_and_nothing_else(bundle, deployment):
    flip(deployment / "model.onnx", 100)
    (deployment / "notes.txt").write_text("mine")
    assert "would delete notes.txt" in fails(pack_deployment, bundle, deployment)
    (deployment / "notes.txt").unlink()
    pack_deployment(bundle, deployment)
    assert verify_deployment(deployment, runs=1).passed


def test_a_changed_bundle_is_not_packed(bundle, tmp_path):
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    flip(copy / "model.onnx", 200)
    assert "model.onnx" in fails(pack_deployment, copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
