"""The memory profiler: peaks, nesting, threads, efficiency, the report."""

import ctypes
import json
import mmap
import sys
import threading
import time

import numpy as np
import pytest
from memory_cases import MB, in_a_process_of_its_own, profile

from qexport import memory
from qexport.errors import QexportError, UsageError
from qexport.memory import AdvancedMemoryProfiler, counters
from qexport.memory.series import Series
from qexport.memory.text import size_text

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs high-water marks that can be reset")


def step_of_200_mb(keep: bool) -> dict:
    kept = []

    def step():
        block = np.ones(200 * MB, np.uint8)
        if keep:
            kept.append(block)

    return profile(step).block("step")["counters"]


def test_the_peak_of_a_block_that_gives_back_what_it_took():
    found = in_a_process_of_its_own(step_of_200_mb, False)
    for name in ("tracemalloc", "rss"):
        assert found[name]["rise_bytes"] == pytest.approx(200 * MB, rel=0.01), name
        assert abs(found[name]["left_bytes"]) < 2 * MB
        assert found[name]["peak_bytes"] == found[name]["before_bytes"] + found[name]["rise_bytes"]


def test_what_stays_is_left():
    found = in_a_process_of_its_own(step_of_200_mb, True)
    for name in {"tracemalloc", "malloc", "rss"} & set(found):
        assert found[name]["left_bytes"] == pytest.approx(200 * MB, rel=0.01), name


def pages(size: int) -> None:
    """Takes memory from the system and gives it back: an allocator would keep it for the next block."""
    with mmap.mmap(-1, size) as block:
        for i in range(0, size, mmap.PAGESIZE):
            block[i] = 1


def nested_blocks(name: str, take) -> list[dict]:
    profiler = AdvancedMemoryProfiler(sources=(name,))
    with profiler.profile_block("outer"):
        take(30 * MB)
        with profiler.profile_block("small"):
            take(10 * MB)
        with profiler.profile_block("large"):
            take(20 * MB)
    return profiler.generate_report().blocks


@pytest.mark.parametrize(("name", "take"), [("tracemalloc", bytearray), pytest.param("rss", pages, marks=LINUX)])
def test_nested_blocks_have_peaks_of_their_own(name, take):
    """30 MB beside the inner blocks, then 10 and 20 inside: each inner peak is its own, the outer one the highest."""
    blocks = in_a_process_of_its_own(nested_blocks, name, take)
    assert [entry["path"] for entry in blocks] == [["outer"], ["outer", "small"], ["outer", "large"]]
    for entry, expected in zip(blocks, (30, 10, 20), strict=True):
        figures = entry["counters"][name]
        assert figures["rise_bytes"] == pytest.approx(expected * MB, abs=MB), entry["path"]
        assert figures["peak_is"] == "exact"


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


def step_of_malloc() -> tuple[dict, int]:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]

    def step():
        block = libc.malloc(50 * MB)
        time.sleep(0.3)
        libc.free(block)

    found = profile(step, sources=("malloc",), interval=0.005)
    return found.block("step")["counters"]["malloc"], max(found.timeline["malloc"]["bytes"])


@pytest.mark.skipif(counters.find(["malloc"])[1].get("malloc") is not None, reason="needs mallinfo2")
def test_the_thread_that_samples_sees_what_has_no_mark():
    """malloc keeps no high-water mark: what was taken and given back within a block is seen by sampling alone."""
    figures, most = in_a_process_of_its_own(step_of_malloc)
    assert figures["rise_bytes"] == pytest.approx(50 * MB, rel=0.01)
    assert figures["peak_is"] == "sampled"
    assert most == figures["peak_bytes"]


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


def test_efficiency_names_what_is_divided():
    profiler = AdvancedMemoryProfiler(sources=("tracemalloc",))
    with profiler.profile_block("step", tokens=100, reference_bytes=80 * MB) as block:
        block.minimum_bytes = 10 * MB
        np.ones(20 * MB, np.uint8)
    found = profiler.generate_report().block("step")["efficiency"]
    rise = found["overhead"]["numerator"]["value"]
    assert rise == pytest.approx(20 * MB, rel=0.01)
    assert found["bytes_per_token"]["value"] == rise / 100
    assert found["bytes_per_token"]["denominator"] == {"what": "tokens", "value": 100}
    assert found["overhead"]["value"] == rise / (10 * MB)
    assert found["overhead"]["numerator"]["what"] == "rise of tracemalloc"
    assert found["compression_ratio"]["value"] == 80 * MB / rise
    without = profile(lambda: None, sources=("tracemalloc",)).block("step")["efficiency"]
    assert set(without.values()) == {None}


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


# The report.


def test_the_report_as_json_text_and_picture(tmp_path):
    profiler = AdvancedMemoryProfiler()
    with profiler.profile_block("attention", tokens=32):
        np.ones(5 * MB, np.uint8)
        time.sleep(0.05)
    report = profiler.generate_report()
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (found["schema"], found["schema_version"]) == ("qexport.memory", 1)
    text = report.to_text()
    for words in ("attention: 1 call", "tracemalloc", "too few readings", "bytes per token", "measuring took"):
        assert words in text
    for kind in ("png", "svg"):
        file = tmp_path / f"memory.{kind}"
        report.plot(file)
        assert file.stat().st_size > 5000
    with pytest.raises(UsageError, match="a plot ends in"):
        report.plot(tmp_path / "memory.txt")
    with pytest.raises(KeyError):
        report.block("nothing")


def test_without_matplotlib_a_plot_is_one_line(tmp_path, monkeypatch):
    report = profile(lambda: None, sources=("tracemalloc",))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(QexportError, match=r"pip install 'qexport\[plot\]'"):
        report.plot(tmp_path / "memory.png")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, ""),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1536, "1.54 KB"),
        (-20_000_000, "-20 MB"),
        (3.2e12, "3200 GB"),
    ],
)
def test_sizes_in_words(count, text):
    assert size_text(count) == text


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
    # full after four: pairs of two; full again after eight: pairs of four
    assert (series.pairs(), series.stride) == (([4, 8], [3, 1]), 4)
    high = Series(4, max)
    for x in range(1, 8):
        high.append(x, 10 * x)
    assert (high.pairs(), high.stride) == (([2, 4, 6], [20, 40, 60]), 2)
