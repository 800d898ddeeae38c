"""Resident memory of this process, and of another one over time."""

import ctypes
import sys
import threading
import time
from pathlib import Path

INTERVAL = 0.005  # seconds between two looks at another process


def _status(key: str, process: int | str = "self") -> int | None:
    """A value in kB of /proc/<process>/status, in bytes; None where there is no such file or key."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def current_rss(process: int | None = None) -> int | None:
    """Bytes resident now, of the process with that id or this one; None where neither /proc nor psutil tells."""
    value = _status("VmRSS", process or "self")
    if value is not None:
        return value
    try:
        import psutil
    except ImportError:
        return None
    try:
        return psutil.Process(process).memory_info().rss or None
    except psutil.Error:  # it has ended
        return None


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


class RssTimeline:
    """Context: looks at the resident memory of the process `pid` every INTERVAL seconds, from outside, while it is entered.

    The process itself does nothing for it, so what it measures of itself stays as it is.
    """

    def __init__(self, pid: int):
        self._process = pid
        self._seen: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "RssTimeline":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            size = current_rss(self._process)
            if size is not None:
                self._seen.append((time.monotonic(), size))

    def to_dict(self, marks: dict[str, float]) -> dict:
        """`seconds` since `marks["open"]` and resident `bytes` then, without the middle of runs of equal figures, and the
        other marks in the same seconds.

        Args:
            marks: times of the system's monotonic clock; nothing from before `open` or after `done` is kept.
        """
        start = marks["open"]
        kept = [(at - start, size) for at, size in self._seen if start <= at <= marks["done"]]
        ends = [
            point
            for i, point in enumerate(kept)
            if i in (0, len(kept) - 1) or not kept[i - 1][1] == point[1] == kept[i + 1][1]
        ]
        others = {name: at - start for name, at in marks.items() if name != "open"}
        return {"seconds": [at for at, _ in ends], "bytes": [size for _, size in ends], **others}
