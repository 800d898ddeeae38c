"""Why CUDA cannot be used here: what is missing or too old, and how to mend it. Neither check needs a model."""

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from qexport import installed
from qexport.failures import one_line
from qexport.providers import CUDA

NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Obstacle:
    """What stands in the way of CUDA, and what to do about it, each half a line.

    Attributes:
        found: what is wrong.
        mend: what to do.
        gpu: whether an NVIDIA GPU was found, that is, whether CUDA could be had here.
    """

    found: str
    mend: str
    gpu: bool = True


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver answers: `error` of its start (0: none), the newest CUDA that it runs as (major, minor)."""

    error: int
    cuda: tuple[int, int]


def driver() -> Driver | None:
    """The NVIDIA driver of this machine; None where there is none."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    return Driver(library.cuInit(0), (version.value // 1000, version.value % 1000 // 10))


def load_error(path) -> str:
    """Why the dynamic linker does not load a library, in its words; empty where it does."""
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return one_line(error)
    return ""


def provider_file() -> Path:
    """The library that holds onnxruntime's CUDA provider."""
    return Path(installed.onnxruntime().__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"


def provider_obstacle() -> Obstacle | None:
    """Why onnxruntime's CUDA provider cannot start here; None where nothing stands in its way."""
    ort = installed.onnxruntime()
    name = f"onnxruntime {ort.__version__}"
    found = driver()
    if CUDA not in ort.get_available_providers():
        mend = "pip uninstall -y onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'"
        return Obstacle(f"{name} is built without CUDA", mend, gpu=found is not None and found.error == 0)
    if found is None:
        return Obstacle("no NVIDIA driver here (libcuda.so.1)", "install the driver of the GPU", gpu=False)
    if found.error == NO_DEVICE:
        return Obstacle("the NVIDIA driver sees no GPU", "check CUDA_VISIBLE_DEVICES and, in a container, --gpus", gpu=False)
    if found.error:
        return Obstacle(f"the NVIDIA driver does not start (cuInit: {found.error})", "reload or reinstall the driver")
    needed = installed.version_tuple(getattr(ort, "cuda_version", "") or "0")
    if needed[0] > found.cuda[0]:
        return Obstacle(
            f"{name} is built for CUDA {needed[0]}, the NVIDIA driver runs CUDA {found.cuda[0]}.{found.cuda[1]} at most",
            f"update the driver, or install an onnxruntime-gpu that is built for CUDA {found.cuda[0]}",
        )
    installed.preload_cuda()
    missing = re.match(r"(\S+): cannot open shared object file", load_error(provider_file()))
    if missing:
        return Obstacle(f"{missing[1]}, which {name} needs, is not found", "pip install 'onnxruntime-gpu[cuda,cudnn]'")
    return None


def plugin_obstacle(library) -> Obstacle | None:
    """Why nodes of com.qexport have no CUDA kernels in sessions with the op library `library`; None where they have."""
    plugin = installed.plugin_path(library)
    if not plugin.is_file():
        mend = "install a wheel of qexport with CUDA kernels, or build it where nvcc is"
        return Obstacle(f"{plugin} is missing, which holds the CUDA kernels of com.qexport", mend)
    error = load_error(plugin)
    return Obstacle(f"{plugin} does not load: {error}", "reinstall qexport") if error else None


def explain_kernel_error(message: str, plugin: Path) -> Obstacle:
    """What a failing CUDA kernel of com.qexport says about this installation."""
    if "no kernel image" in message:
        mend = "build qexport without CMAKE_CUDA_ARCHITECTURES, for every GPU from compute capability 7.5 on"
        return Obstacle(f"{plugin} holds no code for this GPU", mend)
    if "driver version is insufficient" in message:
        return Obstacle(f"{plugin} is built with a newer CUDA than the NVIDIA driver runs", "update the driver")
    return Obstacle(one_line(message), "reinstall qexport and report this")
