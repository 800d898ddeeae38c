"""The memory profiler: peaks, nesting, threads, what it costs, its series."""

import ctypes
import json
import mmap
import threading
import time

import numpy as np
import pytest
from memory_cases import LINUX, MB, alone, profile

from qexport import memory
from qexport.errors import QexportError, UsageError
from qexport.memory import AdvancedMemoryProfiler, counters
from qexport.memory.series import Series


@alone
def test_the_peak_of_a_block_that_gives_back_what_it_took():
    found = profile(lambda: np.ones(200 * MB, np.uint8).any()).block("step")["counters"]
    for name in ("tracemalloc", "rss"):
        assert found[name]["rise_bytes"] == pytest.approx(200 * MB, rel=0.02), (name, found)
        assert abs(found[name]["left_bytes"]) < 5 * MB, (name, found)
        assert found[name]["peak_bytes"] == found[name]["before_bytes"] + found[name]["rise_bytes"], (name, found)


@alone
def test_what_stays_is_left():
    kept = []
    found = profile(lambda: kept.append(np.ones(200 * MB, np.uint8))).block("step")["counters"]
    for name in {"tracemalloc", "malloc", "rss"} & set(found):
        assert found[name]["left_bytes"] == pytest.approx(200 * MB, rel=0.02), (name, found)


def pages(size: int) -> None:
    """Takes memory from the system and gives it back: an allocator would keep it for the next block."""
    with mmap.mmap(-1, size) as block:
        for i in range(0, size, mmap.PAGESIZE):
            block[i] = 1


@pytest.mark.parametrize(("name", "take"), [("tracemalloc", bytearray), pytest.param("rss", pages, marks=LINUX)])
@alone
def test_nested_blocks_have_peaks_of_their_own(name, take):
    """30 MB beside the inner blocks, then 10 and 20 inside: each inner peak is its own, the outer one the highest."""
    profiler = AdvancedMemoryProfiler(sources=(name,))
    with profiler.profile_block("outer"):
        take(30 * MB)
        with profiler.profile_block("small"):
            take(10 * MB)
        with profiler.profile_block("large"):
            take(20 * MB)
    report = profiler.generate_report()
    assert [entry["path"] for entry in report.blocks] == [["outer"], ["outer", "small"], ["outer", "large"]], report.blocks
    for path, expected in ((("outer",), 30), (("outer", "small"), 10), (("outer", "large"), 20)):
        figures = report.block(*path)["counters"][name]
        assert figures["rise_bytes"] == pytest.approx(expected * MB, abs=3 * MB), (path, figures)
        assert figures["peak_is"] == "exact", (path, figures)


def test_calls_of_a_block_are_one_entry():
    profiler = AdvancedMemoryProfiler(sources=("tracemalloc",))
    for size in (1, 5, 2):
        with profiler.profile_block("step"):
            np.ones(size * MB, np.uint8)
    (entry,) = profiler.generate_report().blocks
    assert entry["calls"] == 3
    assert entry["counters"]["tracemalloc"]["rise_bytes"] == pytest.approx(5 * MB, rel=0.01)


def test_a_block_whose_program_fails_is_closed():
    profiler = AdvancedMemoryProfiler(sources=("tracemalloc",))
    with pytest.raises(ZeroDivisionError), profiler.profile_block("outer"), profiler.profile_block("inner"):
        1 / 0  # noqa: B018
    with profiler.profile_block("after"):
        pass
    assert [entry["path"] for entry in profiler.generate_report().blocks] == [["outer"], ["outer", "inner"], ["after"]]


def test_threads_have_blocks_of_their_own_and_overlap():
    profiler = AdvancedMemoryProfiler(sources=("tracemalloc",))
    together = threading.Barrier(3)

    def work(name):
        with profiler.profile_block(name):
            together.wait()
            with profiler.profile_block("part"):
                np.ones(MB, np.uint8)
            together.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    with profiler.profile_block("main"):
        for thread in threads:
            thread.start()
        together.wait()
        together.wait()
        for thread in threads:
            thread.join()
    with profiler.profile_block("alone"):
        pass
    entries = {"/".join(entry["path"]): entry for entry in profiler.generate_report().blocks}
    assert set(entries) == {"main", "a", "a/part", "b", "b/part", "alone"}
    assert entries["a"]["overlapped_calls"] == entries["b/part"]["overlapped_calls"] == 1
    assert entries["main"]["overlapped_calls"] == 1
    assert entries["alone"]["overlapped_calls"] == 0


def test_many_threads_at_once():
    """Readings, blocks and the thread that samples do not step on each other."""
    profiler = AdvancedMemoryProfiler(interval=0.001)

    def work():
        for _ in range(50):
            with profiler.profile_block("step"):
                bytearray(1000)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = profiler.generate_report()
    assert report.block("step")["calls"] == 400
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.skipif(counters.find(["malloc"])[1].get("malloc") is not None, reason="needs mallinfo2")
@alone
def test_the_thread_that_samples_sees_what_has_no_mark():
    """malloc keeps no high-water mark: what was taken and given back within a block is seen by sampling alone."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]

    def step():
        block = libc.malloc(50 * MB)
        time.sleep(0.3)
        libc.free(block)

    found = profile(step, sources=("malloc",), interval=0.005)
    figures = found.block("step")["counters"]["malloc"]
    assert figures["rise_bytes"] == pytest.approx(50 * MB, rel=0.01), figures
    assert figures["peak_is"] == "sampled", figures
    assert max(found.timeline["malloc"]["bytes"]) == figures["peak_bytes"], figures


def test_the_thread_ends_and_so_does_tracing(monkeypatch):
    import tracemalloc

    monkeypatch.setattr(memory, "IDLE_SECONDS", 0.05)
    profiler = AdvancedMemoryProfiler(interval=0.01)

    def sampling():
        return [thread for thread in threading.enumerate() if thread.name == "qexport-memory"]

    with profiler.profile_block("a"):
        assert len(sampling()) == 1
        assert tracemalloc.is_tracing()
    end = time.monotonic() + 20
    while sampling() and time.monotonic() < end:
        time.sleep(0.02)
    assert not sampling()
    with profiler.profile_block("b"):
        assert len(sampling()) == 1
    profiler.generate_report()
    assert not sampling()
    assert not tracemalloc.is_tracing()


def test_a_report_begins_anew():
    profiler = AdvancedMemoryProfiler(sources=("tracemalloc",))
    with profiler.profile_block("a"), pytest.raises(QexportError, match="block 'a' is still open"):
        profiler.generate_report()
    assert [entry["path"] for entry in profiler.generate_report().blocks] == [["a"]]
    assert profiler.generate_report().blocks == []


def test_what_measuring_takes_is_measured_and_bounded(monkeypatch):
    """A counter of 10 ms, looked at a hundred times a second, would take all of the second that the block sleeps."""
    readings = []

    def read():
        end = time.thread_time() + 0.01
        while time.thread_time() < end:
            pass
        readings.append(0)
        return 0, None

    monkeypatch.setitem(counters.SOURCES, "slow", lambda: [counters.Counter("slow", counters.HOST, "nothing", read)])
    profiler = AdvancedMemoryProfiler(sources=("slow",), overhead=0.02)
    with profiler.profile_block("sleep"):
        time.sleep(1)
    within = len(readings)
    report = profiler.generate_report()
    assert 0.01 * within <= report.overhead["seconds"] < 0.2
    assert 2 <= within < 20
    assert report.overhead["share"] == pytest.approx(report.overhead["seconds"] / report.seconds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ("abacus",)}, "no source of memory figures 'abacus'; there are tracemalloc"),
        ({"interval": 0}, "interval must be > 0 seconds, got 0"),
        ({"overhead": 2}, "overhead must be a share in 0..1, got 2"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(UsageError) as error:
        AdvancedMemoryProfiler(**options)
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["tokens", "minimum_bytes", "reference_bytes"])
def test_a_figure_of_a_block_is_above_zero(key):
    profiler = AdvancedMemoryProfiler(sources=("tracemalloc",))
    with pytest.raises(UsageError, match=f"{key} of block 'b' must be > 0, got 0"), profiler.profile_block("b", **{key: 0}):
        pass


def test_a_series_keeps_the_least_of_what_it_puts_together():
    series = Series(4)
    for x, y in enumerate([5, 3, 4, 9, 1, 7, 8, 8], 1):
        series.append(x, y)
    assert (series.pairs(), series.stride) == (([2, 4, 6, 8], [3, 4, 1, 8]), 2)
    series.append(9, 6)  # full again: pairs become fours
    assert (series.pairs(), series.stride) == (([4, 8, 9], [3, 1, 6]), 4)
    high = Series(4, max)
    for x in range(7):
        high.append(x, 10 * x)
    assert (high.pairs(), high.stride) == (([1, 3, 5, 6], [10, 30, 50, 60]), 2)


def test_a_series_keeps_what_comes_rarely_behind_what_came_densely():
    """Merging by the number of readings would make one of many of the last ones too."""
    series = Series(64)
    rare = range(4096, 4096 + 32 * 200, 200)
    for x in (*range(4096), *rare):
        series.append(x, x)
    xs, ys = series.pairs()
    assert xs[-32:] == ys[-32:] == list(rare)
    assert len(xs) <= 64
