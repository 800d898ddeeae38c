"""Resident memory of this process."""

import ctypes
import sys
from pathlib import Path


def _status(key: str) -> int | None:
    """A value in kB of /proc/self/status, in bytes; None where there is no such file."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def current_rss() -> int | None:
    """Bytes resident now; None where neither /proc nor psutil tells."""
    value = _status("VmRSS")
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
    value = _status("VmHWM")
    if value is not None:
        return value
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def extra_rss(call) -> int | None:
    """By how many bytes `call` raises the memory in use while it runs, over what is resident before: its scratch memory,
    and results that it allocates. None where the system cannot forget an earlier peak (it needs Linux and glibc).

    Pages that the allocator holds back are given to the system first: a call that found its memory there would seem to need
    none. The counters of the kernel are exact to some hundred kB.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no CDLL(None)
        return None
    before = current_rss()
    call()
    return max(0, peak_rss() - before)
