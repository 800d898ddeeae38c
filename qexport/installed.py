"""What is installed here: onnxruntime, the op library and its CUDA kernels.

This module and `failures` need the standard library alone: onnxruntime is imported when it is first used, after checking
that exactly one of its packages is installed.
"""

import io
import re
import sys
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from qexport.errors import QexportError
from qexport.failures import one_line

LIBRARY_STEM = "qexport_ops"
OLDEST = (1, 20)
# The distributions that all unpack into the import folder `onnxruntime`.
RUNTIME_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-training",
)


def library_file_name() -> str:
    """The file name of the op library on this platform."""
    prefix, suffix = {"win32": ("", ".dll"), "darwin": ("lib", ".dylib")}.get(sys.platform, ("lib", ".so"))
    return f"{prefix}{LIBRARY_STEM}{suffix}"


def plugin_path(library) -> Path:
    """Where the op library `library` looks for its CUDA kernels: beside itself."""
    library = Path(library)
    return library.with_name(f"{library.stem}_cuda{library.suffix}")


def find_installed(name: str) -> Path | None:
    """A file or folder that the build put into the installed package, or None.

    It lies in the package: beside this file, or in site-packages where this file belongs to an editable install or to a
    source tree that comes first on sys.path.
    """
    folders = [Path(__file__).parent]
    with suppress(metadata.PackageNotFoundError):
        folders.append(Path(metadata.distribution("qexport").locate_file("qexport")))
    return next(((folder / name).resolve() for folder in folders if (folder / name).exists()), None)


def find_library() -> Path | None:
    """The op library of this installation, or None."""
    return find_installed(f"lib/{library_file_name()}")


def find_cuda_plugin() -> Path | None:
    """The CUDA kernels of this installation, or None."""
    library = find_library()
    plugin = library and plugin_path(library)
    return plugin if plugin and plugin.is_file() else None


def get_library_path() -> str:
    """Path of the op library, for `SessionOptions.register_custom_ops_library`.

    Raises:
        QexportError: this installation holds no library.
    """
    path = find_library()
    if path is None:
        raise QexportError(
            f"the op library {library_file_name()} is not in this installation of qexport; install the package "
            "('pip install .' in the source tree), or pass library=False to run the classical fallback"
        )
    return str(path)


@cache
def installed_runtimes() -> dict[str, str]:
    """The installed onnxruntime packages, name to version."""
    found = {}
    for name in RUNTIME_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def version_tuple(text: str) -> tuple[int, ...]:
    """(1, 20, 1) for "1.20.1"; what follows the digits is dropped."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


def check_runtime(packages: dict[str, str]) -> None:
    """Check that exactly one onnxruntime is installed and that it is new enough.

    Args:
        packages: installed onnxruntime packages, name to version, as from `installed_runtimes`.

    Raises:
        QexportError: two of them share the import folder, or the only one is too old.
    """
    if len(packages) > 1:
        listed = " and ".join(f"{name} {version}" for name, version in packages.items())
        raise QexportError(
            f"{listed} are installed together; they share one import folder and break each other: "
            f"run 'pip uninstall -y {' '.join(packages)}', then 'pip install' one of them"
        )
    for name, version in packages.items():
        if version_tuple(version) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise QexportError(f"{name} {version} is too old, qexport needs {oldest} or newer: pip install -U {name}")


@cache
def onnxruntime():
    """The module onnxruntime.

    Raises:
        QexportError: it is missing, broken, installed twice or too old; the message says what to install.
    """
    check_runtime(installed_runtimes())
    try:
        import onnxruntime as module

        # Two packages that were removed one after the other leave a folder without its contents behind.
        version = module.__version__
        _ = module.InferenceSession
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise QexportError(f"onnxruntime cannot be imported: {one_line(error)}; reinstall it") from error
        raise QexportError("onnxruntime is not installed: pip install onnxruntime (or onnxruntime-gpu)") from error
    except (ImportError, AttributeError, OSError) as error:
        raise QexportError(
            f"onnxruntime is installed but broken ({one_line(error)}): pip uninstall it, then install it again"
        ) from error
    check_runtime({"onnxruntime": version})
    return module


@cache
def preload_cuda() -> None:
    """Load the CUDA libraries that pip installed beside onnxruntime, where its provider would not look for them."""
    preload = getattr(onnxruntime(), "preload_dlls", None)  # from 1.21 on
    if preload:
        with redirect_stdout(io.StringIO()):  # it prints what is missing; the provider that does not start is raised
            preload()
