"""The memory profiler: peaks, nesting, threads, what sources say and why they are absent, efficiency, the report."""

import ctypes
import json
import mmap
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from bundle_factory import make_bundle

from qexport import memory, session
from qexport.errors import QexportError, UsageError
from qexport.memory import AdvancedMemoryProfiler, arena, counters
from qexport.memory.series import Series
from qexport.memory.text import size_text
from qexport.runtime import quiet_options

MB = 10**6
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs high-water marks that can be reset")


def profile(step, **options) -> memory.MemoryReport:
    profiler = AdvancedMemoryProfiler(**options)
    with profiler.profile_block("step"):
        step()
    return profiler.generate_report()


def test_the_peak_of_a_block_that_gives_back_what_it_took():
    found = profile(lambda: np.ones(200 * MB, np.uint8).any()).block("step")["counters"]
    for name in ("tracemalloc", "rss"):
        assert found[name]["rise_bytes"] == pytest.approx(200 * MB, rel=0.1), name
        assert abs(found[name]["left_bytes"]) < 2 * MB
        assert found[name]["peak_bytes"] == found[name]["before_bytes"] + found[name]["rise_bytes"]


def test_what_stays_is_left():
    kept = []
    found = profile(lambda: kept.append(np.ones(200 * MB, np.uint8))).block("step")["counters"]
    for name in {"tracemalloc", "malloc", "rss"} & set(found):
        assert found[name]["left_bytes"] == pytest.approx(200 * MB, rel=0.1), name


def pages(size: int) -> None:
    """Takes memory from the system and gives it back: an allocator would keep it for the next block."""
    with mmap.mmap(-1, size) as block:
        for i in range(0, size, mmap.PAGESIZE):
            block[i] = 1


@pytest.mark.parametrize(("name", "take"), [("tracemalloc", bytearray), pytest.param("rss", pages, marks=LINUX)])
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
    assert [entry["path"] for entry in report.blocks] == [["outer"], ["outer", "small"], ["outer", "large"]]
    for path, expected in ((("outer",), 30), (("outer", "small"), 10), (("outer", "large"), 20)):
        figures = report.block(*path)["counters"][name]
        assert figures["rise_bytes"] == pytest.approx(expected * MB, abs=MB), path
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


@pytest.mark.skipif(counters.find(["malloc"])[1].get("malloc") is not None, reason="needs mallinfo2")
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
    assert figures["rise_bytes"] == pytest.approx(50 * MB, rel=0.05)
    assert figures["peak_is"] == "sampled"
    assert max(found.timeline["malloc"]["bytes"]) == figures["peak_bytes"]


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


def test_what_measuring_takes_is_measured_and_bounded():
    """A block that sleeps for half a second, looked at a hundred times a second."""
    report = profile(lambda: time.sleep(0.5))
    assert 0 < report.overhead["seconds"] < 0.1
    assert report.overhead["share"] == pytest.approx(report.overhead["seconds"] / report.seconds)


# Sources that are not there, and those of other machines.


def test_absent_sources_are_named_with_the_reason(monkeypatch):
    for name in ("psutil", "pynvml"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    report = profile(lambda: None, sources=tuple(counters.SOURCES))
    assert report.absent["uss"] == "psutil is not installed: pip install psutil"
    assert report.absent["nvml"] == "nvidia-ml-py is not installed: pip install nvidia-ml-py"
    assert report.absent["torch_cuda"] == "torch was not imported when the first block began"
    assert report.absent["malloc"] == "it needs glibc 2.33 or newer"
    assert "enable_profiling" in report.absent["onnxruntime"]
    assert {"tracemalloc", "rss"} <= set(report.counters)
    assert "absent nvml" in report.to_text()


def test_importing_the_profiler_loads_neither_torch_nor_psutil():
    heavy = ("torch", "psutil", "matplotlib", "onnxruntime")
    code = f"import sys, qexport.memory; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


class FakeCuda:
    """The part of torch.cuda that is asked, of a machine with two devices."""

    def __init__(self):
        self.now, self.peak = [0, 0], [0, 0]

    def is_available(self):
        return True

    is_initialized = is_available

    def device_count(self):
        return 2

    def allocate(self, device, size):
        self.now[device] += size
        self.peak[device] = max(self.peak[device], self.now[device])

    def reset_peak_memory_stats(self, device):
        self.peak[device] = self.now[device]

    def memory_stats_as_nested_dict(self, device):
        figures = {"all": {"current": self.now[device], "peak": self.peak[device]}}
        return {"allocated_bytes": figures, "reserved_bytes": figures}


def test_cuda_devices_are_counted_apart(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    cuda.allocate(1, 1000)

    def step():
        cuda.allocate(1, 500)
        cuda.allocate(1, -500)

    report = profile(step, sources=("torch_cuda",))
    found = report.block("step")["counters"]
    assert (found["torch_cuda:1 allocated"]["peak_bytes"], found["torch_cuda:1 allocated"]["rise_bytes"]) == (1500, 500)
    assert found["torch_cuda:0 allocated"]["peak_bytes"] == 0
    assert report.counters["torch_cuda:1 allocated"]["place"] == "device"


def test_nvml_sees_all_processes_and_is_read_by_the_thread(monkeypatch):
    used = iter([100 * MB, 300 * MB, 200 * MB])
    closed = []

    class NVMLError(Exception):
        pass

    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=next(used, 200 * MB)),
        nvmlShutdown=lambda: closed.append(True),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    report = profile(lambda: time.sleep(0.3), sources=("nvml",))
    found = report.block("step")
    assert found["counters"]["nvml:0"]["peak_bytes"] == 300 * MB
    assert found["counters"]["nvml:0"]["leak"] is None  # another process may be the one that grows
    assert found["efficiency"]["overhead"] is None
    assert closed == [True]

    def fail():
        raise NVMLError("driver not loaded")

    fake.nvmlInit = fail
    assert profile(lambda: None, sources=("nvml",)).absent["nvml"] == "NVML: driver not loaded"


def test_torch_on_the_cpu():
    torch = pytest.importorskip("torch")
    kept = []
    profiler = AdvancedMemoryProfiler(sources=("torch_cpu",))
    with profiler.profile_block("step"):
        kept.append(torch.ones(MB))
        torch.ones(2 * MB)
        with profiler.profile_block("inner"):
            torch.ones(MB)
    report = profiler.generate_report()
    found = report.block("step")["counters"]["torch_cpu"]
    assert found["left_bytes"] == 4 * MB
    assert found["rise_bytes"] == 12 * MB
    assert report.block("step", "inner")["counters"] == {}  # its profiler tells when the outermost block ends


# onnxruntime's arenas.


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("memory") / "bundle")


def traced_session(bundle, tmp_path):
    options = quiet_options()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "trace")
    options.enable_mem_pattern = False
    return session(bundle, library=False, options=options)


def run(opened, items):
    opened.run(None, {"input_ids": np.zeros((items, 32), np.int64), "attention_mask": np.ones((items, 32), np.int64)})


def test_the_arena_of_a_watched_session(bundle, tmp_path):
    profiler = AdvancedMemoryProfiler(sources=())
    opened = traced_session(bundle, tmp_path)
    profiler.watch(opened)
    for name, items in (("small", 1), ("large", 64), ("small again", 1)):
        with profiler.profile_block(name):
            run(opened, items)
    report = profiler.generate_report()
    if "onnxruntime" in report.absent:
        pytest.skip(report.absent["onnxruntime"])
    small, large, again = (entry["counters"]["onnxruntime CPU"] for entry in report.blocks)
    # the scores of the 64 items: heads x length x length floats each
    assert large["peak_bytes"] - small["peak_bytes"] > 63 * 2 * 32 * 32 * 4
    assert (large["peak_is"], again["peak_is"]) == ("exact", "sampled")
    assert again["peak_bytes"] < large["peak_bytes"]
    assert report.counters["onnxruntime CPU"]["place"] == "host"
    moments = report.timeline["onnxruntime CPU"]["seconds"]
    assert 0 <= moments[0] <= moments[-1] <= report.seconds


def test_a_session_without_a_trace_is_refused(bundle):
    with pytest.raises(UsageError, match="enable_profiling"):
        AdvancedMemoryProfiler().watch(session(bundle, library=False))


def test_a_runtime_whose_trace_holds_no_memory(bundle, tmp_path, monkeypatch):
    from qexport.profiling import trace

    def without(path):
        return [[{**e, "args": {k: v for k, v in e["args"].items() if "mem" not in k}} for e in run] for run in read(path)]

    read = trace.read_trace
    monkeypatch.setattr(trace, "read_trace", without)
    opened = traced_session(bundle, tmp_path)
    watched = arena.Watched(opened)
    run(opened, 1)
    arenas, reason = arena.read([watched])
    assert arenas == []
    assert "writes no memory into its trace" in reason


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
