"""Resident memory of this process, as the system counts it."""

import ctypes
import os
import sys


def _status(key: bytes) -> int | None:
    """A value in kB of /proc/self/status, in bytes; None where there is no such file. It is read often, so by plain calls of
    the system: half the time of a file object, and nothing is left for the garbage collector."""
    try:
        file = os.open("/proc/self/status", os.O_RDONLY)
    except OSError:
        return None
    try:
        _, found, rest = os.read(file, 8192).partition(b"\n" + key + b":")
    finally:
        os.close(file)
    return int(rest.split(None, 1)[0]) * 1024 if found else None


def current_rss() -> int | None:
    """Bytes resident now; None where neither /proc nor psutil tells."""
    value = _status(b"VmRSS")
    if value is not None:
        return value
    try:
        import psutil
    except ImportError:
        return None
    return psutil.Process().memory_info().rss


def peak_rss() -> int | None:
    """The most bytes that were resident since the program started.

    On Linux from VmHWM: ru_maxrss would also count the parent's memory at the moment of the fork.
    """
    value = _status(b"VmHWM")
    if value is not None:
        return value
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> bool:
    """Make what is resident now the peak that `peak_rss` tells; False where that cannot be done (it needs Linux)."""
    try:
        file = os.open("/proc/self/clear_refs", os.O_WRONLY)
    except OSError:
        return False
    try:
        os.write(file, b"5")  # VmHWM := VmRSS
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def extra_rss(call) -> int | None:
    """By how many bytes `call` raises the memory in use while it runs, over what is resident before: its scratch memory,
    and results that it allocates. None where the system cannot forget an earlier peak (it needs Linux and glibc).

    Pages that the allocator holds back are given to the system first: a call that found its memory there would seem to need
    none. What other threads give back meanwhile, or the system pages out, is missing from it. The counters of the kernel are
    exact to some hundred kB.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no CDLL(None)
        return None
    if not forget_peak():
        return None
    before = current_rss()
    call()
    return max(0, peak_rss() - before)
