"""The plugin as a file: what it exports and needs, and what is said where it is missing or broken."""

import os
import runpy
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from qexport import _core, installed
from qexport.errors import QexportError
from qexport.nn import cuda, quantum_attention
from qexport.ops import QUANTUM_ATTENTION

WHEEL_SIZE = Path(__file__).parents[2] / ".ci" / "wheel_size.py"


def attention(Q, K, V, device, **more):
    """A call of the kernels with the attributes of strategy `exact`."""
    attributes = {n: v for n, v in QUANTUM_ATTENTION.resolve({"strategy": "exact"}).items() if v is not None}
    return _core.quantum_attention(Q, K, V, **(attributes | more), device=device)


@pytest.fixture
def plugin():
    """The one that QEXPORT_TEST_PLUGIN names, or that of the installation."""
    path = os.environ.get("QEXPORT_TEST_PLUGIN") or installed.find_cuda_plugin()
    if path is None:
        pytest.skip("no CUDA plugin was built: QEXPORT_TEST_PLUGIN is not set, and there is none in this installation")
    return Path(path)


def test_it_exports_one_function_and_needs_no_cuda(plugin):
    symbols = subprocess.run(["nm", "-D", "--defined-only", plugin], capture_output=True, text=True, check=True).stdout
    assert [line.split()[-1] for line in symbols.splitlines()] == ["qexport_cuda_kernels"]
    dynamic = subprocess.run(["readelf", "-d", plugin], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].split(".so")[0] for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert needed <= {"libc", "libm", "libdl", "librt", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
    limits = runpy.run_path(str(WHEEL_SIZE))["LIMITS"]  # of what CI packs without the plugin
    assert plugin.stat().st_size <= limits["libqexport_ops_cuda.so"]


def test_it_loads_without_a_driver_and_says_what_is_missing(plugin):
    kernels = _core.load_cuda(str(plugin))
    assert isinstance(kernels, _core.CudaKernels)
    if torch.cuda.is_available():
        pytest.skip("there is an NVIDIA GPU")

    class Device:
        stream = 0

        def describe(self, array):
            array = np.asarray(array)
            return array.__array_interface__["data"][0], str(array.dtype), array.shape, [1] * array.ndim

        def empty(self, shape, dtype):
            return np.empty(shape, dtype)

        def contiguous(self, array):
            return array

    device = Device()
    device.kernels = kernels
    with pytest.raises(RuntimeError, match=r"^\[QuantumAttention\] CUDA: .*(driver|device)"):
        attention(*[np.zeros((1, 1, 1, 1), np.float32)] * 3, device)


def test_a_file_that_is_no_plugin(tmp_path, monkeypatch):
    broken = tmp_path / "libqexport_ops_cuda.so"
    broken.write_bytes(b"\x7fELF and then nothing")
    with pytest.raises(RuntimeError, match=str(broken)) as raised:
        _core.load_cuda(str(broken))
    assert "\n" not in str(raised.value)
    with pytest.raises(RuntimeError, match="qexport_cuda_kernels"):
        _core.load_cuda(_core.__file__)
    monkeypatch.setattr(installed, "find_cuda_plugin", lambda: broken)
    cuda._plugin.cache_clear()
    with pytest.raises(QexportError, match=r"the CUDA kernels cannot be loaded: .*; reinstall qexport") as raised:
        cuda.cuda_memory(torch.device("cuda", 0))
    assert "\n" not in str(raised.value)
    cuda._plugin.cache_clear()


def test_a_plugin_of_another_release(tmp_path):
    source, other = tmp_path / "other.c", tmp_path / "libqexport_ops_cuda.so"
    source.write_text("static unsigned long table[20] = {1};\nvoid* qexport_cuda_kernels(void) { return table; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", other], check=True)
    with pytest.raises(RuntimeError, match="belongs to another release of qexport"):
        _core.load_cuda(str(other))


def test_without_a_plugin_the_cpu_works_and_the_gpu_is_told_why(monkeypatch):
    monkeypatch.setattr(installed, "find_cuda_plugin", lambda: None)
    cuda._plugin.cache_clear()
    with pytest.raises(QexportError, match="has no CUDA kernels: install it where there is nvcc"):
        cuda.TorchMemory(torch.device("cuda", 0))
    assert cuda.has_kernels(torch.device("cpu"))
    q = torch.randn(1, 2, 5, 8)
    assert torch.isfinite(quantum_attention(q, q, q, backend="kernel")).all()
    cuda._plugin.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": np.zeros(1, np.int64)}, r"seed must be an int64 scalar, got shape \(1,\)"),
        ({"seed": np.zeros((), np.float32)}, "seed must be an int64 scalar"),
        ({"Q": np.zeros((1, 1, 2, 4), np.int32)}, "Q must be float32, .*, got int32"),
        ({"Q": np.zeros((1, 1, 1, 2, 4), np.float32)}, "Q must have at most 4 dimensions, got 5"),
        ({"Q": np.zeros((1, 1, 2, 5), np.float32)}, "K has shape .*, expected the head_size of Q, 5"),
        ({"Q": np.zeros((1, 1, 2, 4), np.float64)}, "must share one float type"),
        ({"nonpad_kv_seqlen": np.zeros(1, np.float32)}, "nonpad_kv_seqlen must be int64"),
        ({"nonpad_kv_seqlen": np.zeros(3, np.int64)}, "nonpad_kv_seqlen has shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_refused(emulated, change, message):
    tensors = {name: np.zeros((1, 1, 2, 4), np.float32) for name in ("Q", "K", "V")}
    with pytest.raises(ValueError, match=rf"\[QuantumAttention\] .*{message}"):
        attention(**(tensors | change), device=emulated)
