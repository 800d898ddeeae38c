"""Why CUDA cannot be used: each way as the probes would find it, and what session, doctor and profile make of it."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from bundle_factory import make_bundle

from qexport import cuda_checks, doctor, installed, runtime
from qexport.cuda_checks import Driver, explain_kernel_error, plugin_obstacle, provider_obstacle
from qexport.errors import QexportError
from qexport.providers import CUDA

GPU_BUILD = ("CUDAExecutionProvider", "CPUExecutionProvider")
NEW = Driver(0, (13, 0))


@pytest.fixture
def machine(monkeypatch):
    """A machine on which CUDA works, and changes to it."""

    def change(driver=NEW, providers=GPU_BUILD, cuda="13.0", missing=""):
        module = SimpleNamespace(
            __version__="1.31.1",
            __file__="/site/onnxruntime/__init__.py",
            cuda_version=cuda,
            get_available_providers=lambda: providers,
        )
        monkeypatch.setattr(installed, "onnxruntime", lambda: module)
        monkeypatch.setattr(cuda_checks, "driver", lambda: driver)
        monkeypatch.setattr(cuda_checks, "load_error", lambda path: missing)

    change()
    installed.preload_cuda.cache_clear()
    yield change
    installed.preload_cuda.cache_clear()


def test_nothing_stands_in_the_way(machine):
    assert provider_obstacle() is None
    machine(missing="/site/x.so: undefined symbol: Provider_GetHost")  # libraries are looked up before symbols
    assert provider_obstacle() is None
    machine(cuda="12.8")  # older than the driver
    assert provider_obstacle() is None


@pytest.mark.parametrize(
    ("change", "found", "mend", "gpu"),
    [
        ({"providers": ("CPUExecutionProvider",)}, "onnxruntime 1.31.1 is built without CUDA", "onnxruntime-gpu", True),
        ({"providers": ("CPUExecutionProvider",), "driver": None}, "is built without CUDA", "onnxruntime-gpu", False),
        ({"driver": None}, "no NVIDIA driver here", "install the driver", False),
        ({"driver": Driver(100, (13, 0))}, "sees no GPU", "CUDA_VISIBLE_DEVICES", False),
        ({"driver": Driver(803, (13, 0))}, r"does not start \(cuInit: 803\)", "reinstall the driver", True),
        ({"driver": Driver(0, (12, 4))}, r"built for CUDA 13, the NVIDIA driver runs CUDA 12\.4", "built for CUDA 12", True),
        (
            {"missing": "libcublasLt.so.13: cannot open shared object file: No such file or directory"},
            r"^libcublasLt\.so\.13, which onnxruntime 1\.31\.1 needs",
            r"onnxruntime-gpu\[cuda,cudnn\]",
            True,
        ),
    ],
)
def test_what_stands_in_the_way_of_the_provider(machine, change, found, mend, gpu):
    machine(**change)
    obstacle = provider_obstacle()
    assert re.search(found, obstacle.found), obstacle
    assert re.search(mend, obstacle.mend), obstacle
    assert obstacle.gpu == gpu


def test_the_plugin_is_looked_for_beside_the_library(tmp_path):
    library = tmp_path / installed.library_file_name()
    plugin = installed.plugin_path(library)
    assert str(plugin) in plugin_obstacle(library).found
    plugin.write_text("no library")
    assert f"{plugin} does not load: " in plugin_obstacle(library).found
    shutil.copyfile(installed.get_library_path(), plugin)  # any library that loads
    assert plugin_obstacle(library) is None


def test_errors_of_a_kernel():
    plugin = Path("/site/libqexport_ops_cuda.so")
    assert "no code for this GPU" in explain_kernel_error("CUDA: no kernel image is available for execution", plugin).found
    newer = explain_kernel_error("CUDA driver version is insufficient for CUDA runtime version", plugin)
    assert "newer CUDA" in newer.found
    assert explain_kernel_error("misaligned address", plugin).found == "misaligned address"


def test_asked_for_cuda_and_no_kernels(tmp_path):
    library = tmp_path / installed.library_file_name()
    with pytest.raises(QexportError, match=r"libqexport_ops_cuda\.so is missing.*allow_fallback=True"):
        runtime.check_kernels(library, [("CUDAExecutionProvider", {"device_id": 0})])
    runtime.check_kernels(library, ["CUDAExecutionProvider"], allow_fallback=True)
    runtime.check_kernels(library, ["CPUExecutionProvider"])


def test_session_and_probe_check_the_kernels(tmp_path, monkeypatch):
    """onnxruntime starts without CUDA here, so what was asked for is changed behind its back."""
    import onnx

    from qexport.validation.probes import open_probe

    make_bundle(tmp_path / "b")
    library = tmp_path / installed.library_file_name()
    shutil.copyfile(installed.get_library_path(), library)
    opened = []

    def create(path, source, options, providers, library):
        opened.append(providers)
        return "session"

    monkeypatch.setattr(runtime, "check_providers", list)
    monkeypatch.setattr(runtime, "create_session", create)
    monkeypatch.setattr("qexport.validation.probes.check_providers", list)
    monkeypatch.setattr("qexport.validation.probes.create_session", create)
    ask = {"library": str(library), "providers": ["CUDAExecutionProvider"]}
    with pytest.raises(QexportError, match="is missing"):
        runtime.session(tmp_path / "b", **ask)
    assert runtime.session(tmp_path / "b", **ask, allow_fallback=True) == "session"
    model = onnx.load(tmp_path / "b" / "model.onnx")
    with pytest.raises(QexportError, match="is missing"), open_probe(model, tmp_path / "b" / "model.onnx", **ask):
        pass
    assert len(opened) == 3


@pytest.mark.parametrize("flag", [[], ["--allow-fallback"]])
def test_the_flag_of_profile_reaches_its_sessions(qexport, tmp_path, monkeypatch, flag):
    make_bundle(tmp_path / "b")
    asked = []
    monkeypatch.setattr(runtime, "check_kernels", lambda library, providers, allow_fallback: asked.append(allow_fallback))
    code, _, err = qexport("profile", tmp_path / "b", "--seq", 8, "--runs", 1, "--warmup", 0, *flag)
    assert code == 0, err
    assert asked[0] == bool(flag)


def test_a_broken_plugin_leaves_the_cpu_alone(tmp_path):
    make_bundle(tmp_path / "b")
    library = tmp_path / installed.library_file_name()
    shutil.copyfile(installed.get_library_path(), library)
    installed.plugin_path(library).write_text("no library")
    feed = {"input_ids": np.arange(10)[None], "attention_mask": np.ones((1, 10), np.int64)}
    found = runtime.run(runtime.session(tmp_path / "b", library=library), None, feed)[0]
    np.testing.assert_array_equal(found, runtime.run(runtime.session(tmp_path / "b"), None, feed)[0])


def cuda_finding():
    return next(finding for finding in doctor.doctor() if finding.subject == "CUDA")


def test_doctor_is_content_where_the_kernel_runs(monkeypatch):
    monkeypatch.setattr(cuda_checks, "provider_obstacle", lambda: None)
    monkeypatch.setattr(cuda_checks, "plugin_obstacle", lambda library: None)
    real = doctor.kernel_error
    monkeypatch.setattr(doctor, "kernel_error", lambda provider: real("CPUExecutionProvider"))
    assert cuda_finding().state == doctor.OK
    assert "agrees with numpy" in cuda_finding().found
    monkeypatch.setattr(doctor, "kernel_error", lambda provider: np.nan if provider == CUDA else real(provider))
    assert cuda_finding().state == doctor.BROKEN
    assert "off by nan" in cuda_finding().found

    def fails(provider):
        if provider == CUDA:
            raise RuntimeError("[QuantumAttention] CUDA: no kernel image is available for execution on the device")
        return real(provider)

    monkeypatch.setattr(doctor, "kernel_error", fails)
    assert "no code for this GPU" in cuda_finding().found


def test_doctor_names_the_variable_that_asks_for_an_unknown_instruction_set(monkeypatch):
    def fails(provider):
        raise RuntimeError("Exception during initialization: QEXPORT_ISA must be one of generic, got mmx")

    monkeypatch.setattr(doctor, "kernel_error", fails)
    finding = next(finding for finding in doctor.doctor() if finding.subject == "kernel")
    assert finding.found == "QEXPORT_ISA must be one of generic, got mmx"
    assert finding.mend.startswith("unset QEXPORT_ISA")


def test_doctor_calls_it_broken_only_where_there_is_a_gpu(monkeypatch):
    for gpu, state in ((True, doctor.BROKEN), (False, doctor.NOTE)):
        obstacle = cuda_checks.Obstacle("something is wrong", "mend it", gpu)
        monkeypatch.setattr(cuda_checks, "provider_obstacle", lambda obstacle=obstacle: obstacle)
        assert cuda_finding() == doctor.Finding("CUDA", state, "something is wrong; models run on the CPU", "mend it")
