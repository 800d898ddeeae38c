"""onnxruntime with the op library: find both, open sessions, and turn load failures into one line.

Needs numpy, onnx and onnxruntime alone. onnxruntime is imported when it is first used, after checking that exactly one
of its packages is installed.
"""

import os
import re
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from qexport.errors import QexportError, UsageError
from qexport.external_data import check_external_data

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


def find_library() -> Path | None:
    """The op library of this installation, or None.

    It lies in qexport/lib of the installed package: beside this file, or in site-packages where this file belongs to an
    editable install or to a source tree that comes first on sys.path.
    """
    folders = [Path(__file__).parent]
    with suppress(metadata.PackageNotFoundError):
        folders.append(Path(metadata.distribution("qexport").locate_file("qexport")))
    for folder in folders:
        candidate = folder / "lib" / library_file_name()
        if candidate.is_file():
            return candidate.resolve()
    return None


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


def check_providers(providers) -> list:
    """`providers` as a list, or the CPU provider when None.

    Args:
        providers: names, or (name, options) pairs, as onnxruntime takes them.

    Raises:
        UsageError: one of them is not in this onnxruntime, which would fall back to the CPU with only a warning.
    """
    if providers is None:
        return ["CPUExecutionProvider"]
    available = onnxruntime().get_available_providers()
    for provider in providers:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            raise UsageError(f"provider {name!r} is not in this onnxruntime; available: {', '.join(available)}")
    return list(providers)


def session(path, *, library=True, providers=None, options=None):
    """An onnxruntime session of a model, with the op library registered.

    Args:
        path: the .onnx file, or the folder of a bundle.
        library: True registers the op library of this installation, False none (QuantumAttention then runs its classical
            fallback), a path registers that file.
        providers: execution providers in the order of preference; the CPU alone when None.
        options: an onnxruntime.SessionOptions to add the library to; a fresh one that logs nothing when None.

    Raises:
        UsageError: a provider that is not available.
        QexportError: the file is missing, damaged, too new for this onnxruntime, or needs an op that is not there.
    """
    ort = onnxruntime()
    path = Path(path)
    if path.is_dir():
        path = path / "model.onnx"
    if not path.is_file():
        raise QexportError(f"{path}: no such model file")
    providers = check_providers(providers)
    if options is None:
        options = quiet_options()
    if library:
        register_library(options, get_library_path() if library is True else str(library))
    # Older runtimes read external data from anywhere on the disk; newer ones check the folder themselves.
    if version_tuple(ort.__version__) < (1, 25):
        check_external_data(path)
    return create_session(path, str(path), options, providers, bool(library))


def create_session(path, source, options, providers, library: bool):
    """An onnxruntime session of `source` (a path or the bytes of a model); `path` and `library` are for messages.

    Raises:
        QexportError: the model does not load, or a provider does not start.
    """
    ort = onnxruntime()
    ort.set_default_logger_severity(4)  # a provider that fails to start would print pages before we say so in one line
    try:
        opened = ort.InferenceSession(source, options, providers=providers)
    except Exception as error:  # onnxruntime raises a dozen types, all straight from Exception
        raise explain_load_error(path, error, library) from error
    finally:
        ort.set_default_logger_severity(2)  # onnxruntime's default; it has no getter
    for provider in providers:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in opened.get_providers():
            raise QexportError(
                f"provider {name!r} did not start; its driver or libraries are missing "
                "(for CUDA: pip install 'onnxruntime-gpu[cuda,cudnn]', and an NVIDIA driver)"
            )
    return opened


def run(opened, outputs, feed: dict) -> list:
    """`session.run`, with failures as one line.

    Raises:
        QexportError: names the node that failed and why.
    """
    try:
        return opened.run(outputs, feed)
    except Exception as error:  # as in session()
        raise _explain_run_error(error) from error


def run_bound(opened, binding, options=None) -> None:
    """`session.run_with_iobinding`, with failures as one line; `options` are onnxruntime's RunOptions.

    Raises:
        QexportError: names the node that failed and why.
    """
    try:
        opened.run_with_iobinding(binding, options)
    except Exception as error:  # as in session()
        raise _explain_run_error(error) from error


def _explain_run_error(error: Exception) -> QexportError:
    """A failure of a running model as one line."""
    message = _bare(str(error))
    if match := re.search(r"while running (\S+) node\. Name:'(.*?)' Status Message: (.*)", message, flags=re.S):
        name = f"node {match[2]!r} ({match[1]})" if match[2] else f"a node {match[1]} of a fallback"
        return QexportError(f"{name} failed: {one_line(_bare(match[3]))}")
    return QexportError(f"the model does not run: {one_line(message)}")


def quiet_options():
    """Session options that log nothing: what fails is raised, and onnxruntime would print it as well."""
    options = onnxruntime().SessionOptions()
    options.log_severity_level = 4
    return options


def register_library(options, library: str) -> None:
    """Add the op library to session options; a failure names the file."""
    try:
        options.register_custom_ops_library(library)
    except Exception as error:
        reason = one_line(re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)))
        raise QexportError(f"cannot load the op library {library}: {reason}") from error


def one_line(message, limit: int = 300) -> str:
    """A message on one line, cut off at `limit` characters."""
    text = " ".join(str(message).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def explain_load_error(path, error: Exception, library: bool) -> QexportError:
    """A failure of onnxruntime to load `path` as one line: what is wrong, where, and what to do."""
    return QexportError(f"{path}: {_load_failure(path, str(error), library)}")


def _load_failure(path, message: str, library: bool) -> str:
    runtime = f"onnxruntime {onnxruntime().__version__}"
    if "Protobuf parsing failed" in message or "No graph was found" in message or "does not have a graph" in message:
        size = os.path.getsize(path)
        return f"not an ONNX model, or cut short ({size} bytes); copy or convert it again"
    if match := re.search(r"Unsupported model IR version: (\d+), max supported IR version: (\d+)", message):
        return f"IR version {match[1]} is newer than {runtime} reads ({match[2]}); upgrade it or write IR 10"
    if match := re.search(r"Opset (\d+) is under development", message):
        return f"opset {match[1]} is newer than {runtime} knows; upgrade it or convert with a lower --opset"
    if match := re.search(r"Fatal error: (\S+?):(\w+)\(-?\d+\) is not a registered function/op", message):
        domain, op = match[1], match[2]
        if domain == "com.qexport" and not library:
            return f"op {domain}:{op} has no fallback function in the file; load it with the op library"
        return f"op {domain}:{op} is unknown to {runtime}; register the library that holds it or convert it away"
    if match := re.search(r"No Op registered for (\w+) with domain_version of (\d+)", message):
        return f"op {match[1]} of opset {match[2]} is unknown to {runtime}; upgrade it or lower the --opset"
    if match := re.search(r"Please load external data into raw data for tensor: (\S+)", message):
        return (
            f"{runtime} needs {match[1]!r} to compute shapes, but it is stored outside the file; keep small tensors inside"
        )
    if "External data path" in message or "external data" in message.lower() or "External initializer" in message:
        return f"its external data is missing, cut short or outside its folder: {one_line(_bare(message))}"
    if "cannot get file size" in message or "cannot open file" in message.lower():
        return f"a file it needs cannot be read: {one_line(_bare(message))}"
    return f"{runtime} cannot load it: {one_line(_bare(message))}"


def _bare(message: str) -> str:
    """An onnxruntime message without its code, source file and C++ signature."""
    message = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", message)
    message = re.sub(r"Load model from .*? failed:", "", message)
    return re.sub(r"/onnxruntime_src/\S+:\d+ .*?\)(?: const)? (?=\w)", "", message, flags=re.S)
