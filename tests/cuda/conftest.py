"""The fixture `device`: what the CUDA kernels are tested on."""

import functools
import shutil

import devices
import emulation_library
import pytest

DEVICES = ("emulated", pytest.param("gpu", marks=pytest.mark.gpu))


@pytest.fixture(scope="session")
def emulation(pytestconfig):
    """Builds the emulation library, or a program with the kernels in it."""
    if emulation_library.cuda_headers() is None or shutil.which("g++") is None:
        pytest.skip("the emulation needs g++ and the headers of a CUDA toolkit: pip install 'qexport[cuda-build]'")
    return functools.partial(emulation_library.build, pytestconfig.cache.mkdir("cuda_emulation"))


@pytest.fixture(scope="session")
def emulated(emulation):
    return devices.Emulated(emulation())


@pytest.fixture
def emulated_large(emulated, monkeypatch):
    """With more multiprocessors than there are tiles, so that some warpgroups share their queries."""
    monkeypatch.setenv("QEXPORT_EMULATED_MULTIPROCESSORS", "32")
    return emulated


@pytest.fixture
def emulated_sm75(emulated, monkeypatch):
    """Without matrix units that the kernels know, with 64 KiB of shared memory."""
    monkeypatch.setenv("QEXPORT_EMULATED_CAPABILITY", "75")
    return emulated


@pytest.fixture
def emulated_sm86(emulated, monkeypatch):
    """With products of warps alone, and 99 KiB of shared memory."""
    monkeypatch.setenv("QEXPORT_EMULATED_CAPABILITY", "86")
    return emulated


@pytest.fixture(scope="session")
def gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU")
    return devices.gpu()


@pytest.fixture(params=DEVICES)
def device(request):
    """Each test runs on both. A test that only one of them can take in time parametrises it indirectly (`split`)."""
    return request.getfixturevalue(request.param)
