"""onnxruntime on the CPU, with the op library or without it."""

import onnxruntime

from qexport.installed import get_library_path
from qexport.runtime import quiet_options


def cpu_session(model, *, library: bool = True, threads: int | None = 1):
    """A session of a ModelProto or its bytes."""
    options = quiet_options(threads)
    if library:
        options.register_custom_ops_library(get_library_path())
    model = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
