"""What can be asked how much memory is in use: a `Counter` per figure, found by the sources below.

A source that is not there says why. None of them imports a library that the program has not imported itself: a profiler that
loads torch to ask for its memory would mostly measure that.
"""

import ctypes
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from qexport.memory import rss

HOST, DEVICE = "host", "device"


class AbsentError(Exception):
    """A source is not there; the message is the reason."""


@dataclass
class Counter:
    """One figure that goes up and down, in bytes.

    Attributes:
        name: what it is called in reports.
        place: "host" or "device", whose memory it counts.
        covers: in words, what it sees and what it does not.
        read: (bytes now, high-water mark since `reset`); either is None where it is not known.
        reset: makes the bytes of now the high-water mark; whether that worked. None for marks that cannot be reset.
        every_call: whether it is read when a block begins and ends, or by the thread that samples alone.
        own_process: whether it counts this process alone.
        least_growth: bytes that it may grow by without anybody keeping anything.
        begin, end: called when the first block opens and the last one closes.
        close: gives back what the source took.
    """

    name: str
    place: str
    covers: str
    read: Callable[[], tuple[int | None, int | None]]
    reset: Callable[[], bool] | None = None
    every_call: bool = True
    own_process: bool = True
    least_growth: int = 0
    begin: Callable[[], None] | None = None
    end: Callable[[], None] | None = None
    close: Callable[[], None] | None = None


def _tracemalloc() -> list[Counter]:
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()

    def reset() -> bool:
        tracemalloc.reset_peak()
        return True

    return [
        Counter(
            "tracemalloc",
            HOST,
            "what Python's allocators gave out, arrays of numpy included, since the profiler began",
            tracemalloc.get_traced_memory,
            reset,
            close=tracemalloc.stop if started else None,
        )
    ]


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    )


def _malloc() -> list[Counter]:
    try:
        function = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no CDLL(None)
        raise AbsentError("it needs glibc 2.33 or newer") from None
    function.restype = _MallInfo

    def read():
        found = function()
        return found.uordblks + found.hblkhd, None

    return [Counter("malloc", HOST, "what glibc's malloc gave out to everybody, Python's small objects excepted", read)]


# Resident pages grow while allocators use what they hold for the first time, Python's in arenas of 1 MiB (pymalloc) and
# glibc's in steps of 128 KiB (M_TOP_PAD), and the system counts them up to some hundred kB late.
PAGES_LEAST_GROWTH = 1 << 20


def _rss() -> list[Counter]:
    if rss.current_rss() is None:
        raise AbsentError("neither /proc/self/status nor psutil is there")
    covers = "resident pages of the process: what the system counts, kept by allocators included"

    def read():
        return rss.current_rss(), rss.peak_rss()

    return [Counter("rss", HOST, covers, read, rss.forget_peak, least_growth=PAGES_LEAST_GROWTH)]


def _uss() -> list[Counter]:
    try:
        import psutil
    except ImportError:
        raise AbsentError("psutil is not installed: pip install psutil") from None
    process = psutil.Process()
    try:
        process.memory_full_info().uss  # noqa: B018 - not there on every system
    except (AttributeError, psutil.Error) as error:
        raise AbsentError(f"psutil does not tell it here: {error}") from None
    covers = "resident pages that no other process shares: what ending the process would give back"

    def read():
        return process.memory_full_info().uss, None

    return [Counter("uss", HOST, covers, read, every_call=False, least_growth=PAGES_LEAST_GROWTH)]


def _imported_torch():
    torch = sys.modules.get("torch")
    if torch is None:
        raise AbsentError("torch was not imported when the first block began")
    return torch


class _TorchCpu:
    """torch's allocator on the CPU keeps no counter; its own profiler reports each allocation while it runs."""

    def __init__(self, torch):
        self.torch, self.profiler, self.total, self.peak = torch, None, 0, 0

    def begin(self) -> None:
        profiler = self.torch.profiler
        self.profiler = profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profiler.__enter__()

    def end(self) -> None:
        self.profiler.__exit__(None, None, None)
        # the events of `profiler.events()` have what one operator took and gave back added up, which hides the peak
        events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        self.profiler, self.peak = None, self.total
        for event in sorted(events, key=lambda e: e.start_ns()):
            if event.device_type() == self.torch.autograd.DeviceType.CPU:
                self.total += event.nbytes()
                self.peak = max(self.peak, self.total)

    def read(self):
        return (None, None) if self.profiler else (self.total, self.peak)


def _torch_cpu() -> list[Counter]:
    watch = _TorchCpu(_imported_torch())
    covers = "tensors of torch on the CPU, by torch's profiler: those made since the first block began"
    return [Counter("torch_cpu", HOST, covers, watch.read, lambda: True, begin=watch.begin, end=watch.end)]


def _torch_cuda() -> list[Counter]:
    cuda = _imported_torch().cuda
    if not cuda.is_available():
        raise AbsentError("this torch finds no CUDA device")

    def allocator(device: int, kind: str) -> Counter:
        def read():
            if not cuda.is_initialized():  # asking would make a context, some hundred MB of it
                return 0, 0
            found = cuda.memory_stats_as_nested_dict(device)[f"{kind}_bytes"]["all"]
            return found["current"], found["peak"]

        def reset() -> bool:
            if cuda.is_initialized():
                cuda.reset_peak_memory_stats(device)
            return True

        what = {"allocated": "tensors of torch", "reserved": "memory that torch's allocator holds"}[kind]
        return Counter(f"torch_cuda:{device} {kind}", DEVICE, f"{what} on CUDA device {device}", read, reset)

    return [allocator(device, kind) for device in range(cuda.device_count()) for kind in ("allocated", "reserved")]


def _nvml() -> list[Counter]:
    try:
        import pynvml
    except ImportError:
        raise AbsentError("nvidia-ml-py is not installed: pip install nvidia-ml-py") from None
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        raise AbsentError(f"NVML: {error}") from None

    def device(handle):
        def read():
            return pynvml.nvmlDeviceGetMemoryInfo(handle).used, None

        return read

    covers = "memory in use on GPU {}, by whatever process"
    found = [
        Counter(f"nvml:{i}", DEVICE, covers.format(i), device(handle), every_call=False, own_process=False)
        for i, handle in enumerate(handles)
    ]
    if not found:
        raise AbsentError("NVML finds no GPU")
    found[0].close = pynvml.nvmlShutdown
    return found


SOURCES = {
    "tracemalloc": _tracemalloc,
    "malloc": _malloc,
    "rss": _rss,
    "uss": _uss,
    "torch_cpu": _torch_cpu,
    "torch_cuda": _torch_cuda,
    "nvml": _nvml,
}
# All but the one that slows every operation of torch down.
DEFAULT = tuple(name for name in SOURCES if name != "torch_cpu")


NOT_ASKED = "not asked for in `sources`"


def find(names) -> tuple[list[Counter], dict[str, str]]:
    """The counters of these sources, and of those that are not there, or not asked for, the reason."""
    counters, absent = [], {name: NOT_ASKED for name in SOURCES if name not in names}
    for name in names:
        try:
            counters += SOURCES[name]()
        except AbsentError as reason:
            absent[name] = str(reason)
    return counters, absent


def close(counters) -> None:
    """Give back what the sources took."""
    for counter in counters:
        if counter.close:
            with suppress(Exception):  # a driver that is gone has nothing left to give back
                counter.close()
