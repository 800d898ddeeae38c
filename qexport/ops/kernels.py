"""The C++ kernels, where they were built."""

import functools


@functools.cache
def kernels():
    """The module of the kernels' Python functions, `qexport._core`; None in a source tree that was never built."""
    try:
        from qexport import _core
    except ImportError:
        return None
    return _core
