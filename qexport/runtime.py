"""Sessions of onnxruntime with the op library: on the providers that are asked for, with failures as one line.

Needs numpy and onnxruntime alone.
"""

import os
import re
from importlib.util import find_spec

from qexport import cuda_checks, installed
from qexport.arguments import as_path, whole
from qexport.errors import QexportError, UsageError
from qexport.failures import explain_load_error, explain_run_error, one_line
from qexport.providers import CPU, CUDA, SHORT, device, full_names, provider_name

# More threads than processors may be asked for, to measure what they cost: so many per processor, and these anywhere.
THREADS_PER_PROCESSOR, THREADS_ANYWHERE = 4, 64


def check_providers(providers) -> list:
    """`providers` as `qexport.providers.full_names` writes them, all of them in this onnxruntime.

    Raises:
        UsageError: as `full_names`, or one of them is not there: onnxruntime would fall back to the CPU with only a warning.
    """
    found, available = full_names(providers), installed.onnxruntime().get_available_providers()
    for name in map(provider_name, found):
        if name not in available:
            listed = f"; available: {', '.join(available)}; for short: {', '.join(SHORT)}"
            why = f": {_why_not_started(name)}" if name == CUDA else listed
            raise UsageError(f"provider {name!r} is not in this onnxruntime{why}")
    if CUDA in map(provider_name, found):
        installed.preload_cuda()
    return found


def check_start(providers, allow_fallback=False) -> None:
    """Check that `session` will not fail for its providers, by one without work: for whoever would write something before
    its first session, or goes on where a session fails.

    Raises:
        UsageError, QexportError: as `session` about `providers`.
    """
    providers = check_providers(providers)
    if providers == [CPU]:
        return
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "start", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    create_session(", ".join(map(provider_name, providers)), model.SerializeToString(), quiet_options(), providers, False)
    check_kernels(installed.get_library_path(), providers, allow_fallback)


def device_of(opened) -> tuple[str, int]:
    """Where the tensors of a session lie that no other device needs: ("cuda", number) or ("cpu", 0)."""
    options = opened.get_provider_options()
    return device([(name, options[name]) for name in opened.get_providers()])


def session(path, *, library=True, providers=None, options=None, allow_fallback=False):
    """An onnxruntime session of a model, with the op library registered.

    Args:
        path: the .onnx file, or the folder of a bundle.
        library: True registers the op library of this installation, False none (QuantumAttention then runs its classical
            fallback), a path registers that file.
        providers: execution providers in the order of preference, by onnxruntime's names or cpu and cuda, or pairs of a
            name and options; the CPU alone when None.
        options: an onnxruntime.SessionOptions to add the library to; a fresh one that logs nothing when None.
        allow_fallback: whether nodes of com.qexport may run on the CPU where CUDA is asked for and has no kernels of them.

    Raises:
        UsageError: a provider that is not available, is named twice, or stands behind the CPU.
        QexportError: the file is missing, damaged, too new for this onnxruntime, or needs an op that is not there; a
            provider does not start, or the CUDA kernels of the op library are missing.
    """
    ort = installed.onnxruntime()
    path = as_path("path", path)
    if path.is_dir():
        folder, path = path, path / "model.onnx"
        if not path.is_file():
            raise QexportError(f"{folder}: no bundle, it has no model.onnx; make one with 'qexport convert MODEL -o DIR'")
    if not path.is_file():
        raise QexportError(f"{path}: no such model file")
    providers = check_providers(providers)
    if options is None:
        options = quiet_options()
    if not isinstance(options, ort.SessionOptions):
        raise UsageError(f"options must be an onnxruntime.SessionOptions, got {type(options).__name__}")
    if library is True:
        library = installed.get_library_path()
    if library:
        register_library(options, str(library))
    # Older runtimes read external data from anywhere on the disk; newer ones check the folder themselves. Only a target of
    # qexport.remote, which looked before it copied, may lack onnx.
    if installed.version_tuple(ort.__version__) < (1, 25) and find_spec("onnx"):
        from qexport.external_data import check_external_data

        check_external_data(path)
    opened = create_session(path, str(path), options, providers, bool(library))
    if library:
        check_kernels(library, providers, allow_fallback)
    return opened


def create_session(path, source, options, providers, library: bool):
    """An onnxruntime session of `source` (a path or the bytes of a model); `path` and `library` are for messages.

    Raises:
        QexportError: the model does not load, or a provider does not start.
    """
    ort = installed.onnxruntime()
    ort.set_default_logger_severity(4)  # a provider that fails to start would print pages before we say so in one line
    try:
        # else a provider that fails, also in a run, is replaced by another one, with a message on stdout
        opened = ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises a dozen types, all straight from Exception
        raise explain_load_error(path, error, f"onnxruntime {ort.__version__}", library) from error
    finally:
        ort.set_default_logger_severity(2)  # onnxruntime's default; it has no getter
    for name in map(provider_name, providers):
        if name not in opened.get_providers():
            raise QexportError(f"provider {name!r} did not start: {_why_not_started(name)}")
    return opened


def _why_not_started(provider: str) -> str:
    obstacle = cuda_checks.provider_obstacle() if provider == CUDA else None
    return f"{obstacle.found}; {obstacle.mend}" if obstacle else "its driver or libraries are missing"


def run(opened, outputs, feed: dict) -> list:
    """`session.run`, with failures as one line.

    Raises:
        QexportError: names the node that failed and why.
    """
    try:
        return opened.run(outputs, feed)
    except Exception as error:  # as in session()
        raise explain_run_error(error) from error


def run_bound(opened, binding, options=None) -> None:
    """`session.run_with_iobinding`, with failures as one line; `options` are onnxruntime's RunOptions.

    Raises:
        QexportError: names the node that failed and why.
    """
    try:
        opened.run_with_iobinding(binding, options)
    except Exception as error:  # as in session()
        raise explain_run_error(error) from error


def check_threads(threads: int | None) -> None:
    """Check a number of intra-op threads for this machine; None is the runtime's choice.

    Raises:
        UsageError: it is no whole number from 1 on, or far above the processors here: each thread spins for a while when it
            has nothing to do, and thousands of them stall the machine.
    """
    count = os.cpu_count() or 1
    most = max(THREADS_ANYWHERE, THREADS_PER_PROCESSOR * count)
    if threads is not None and whole("threads", threads) > most:
        raise UsageError(f"threads must be at most {most} on a machine with {count} processors, got {threads}; lower it")


def quiet_options(threads: int | None = None):
    """Session options with that many intra-op threads, the runtime's choice when None. They log nothing: what fails is
    raised, and onnxruntime would print it as well.

    Raises:
        UsageError: as `check_threads`.
    """
    check_threads(threads)
    options = installed.onnxruntime().SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def check_kernels(library, providers, allow_fallback=False) -> None:
    """Check that nodes of com.qexport run where they are asked to.

    Raises:
        QexportError: CUDA is among the providers and the op library `library` has no CUDA kernels, unless `allow_fallback`.
    """
    if allow_fallback or CUDA not in map(provider_name, providers):
        return
    if obstacle := cuda_checks.plugin_obstacle(library):
        raise QexportError(
            f"{obstacle.found}; {obstacle.mend}, or run these nodes on the CPU: allow_fallback=True (--allow-fallback)"
        )


def register_library(options, library: str) -> None:
    """Add the op library to session options.

    Raises:
        QexportError: the file is missing, or no op library for this machine.
    """
    path = os.path.abspath(library)  # the system looks for a bare name in its own folders, and not here
    mend = f"give a {installed.library_file_name()} that was built for this machine"
    if not os.path.isfile(path):
        raise QexportError(f"{library}: no such op library; {mend}")
    try:
        options.register_custom_ops_library(path)
    except Exception as error:
        # behind onnxruntime's words stand those of the system, each with the path
        reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Failed to .*? with error: )?", "", str(error))
        reason = one_line(reason.removeprefix(f"{path}: "))
        raise QexportError(f"cannot load the op library {library}: {reason}; {mend}") from error
