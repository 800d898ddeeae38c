"""Sources of memory figures: those that are not there, those of GPUs and of torch, and the arenas of onnxruntime."""

import ctypes
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from bundle_factory import make_bundle
from memory_cases import MB, profile

from qexport import session
from qexport.errors import UsageError
from qexport.memory import AdvancedMemoryProfiler, arena, counters
from qexport.runtime import quiet_options


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
    used = [200 * MB, 300 * MB, 100 * MB]  # the last one first
    closed = []

    class NVMLError(Exception):
        pass

    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=used.pop() if used else 200 * MB),
        nvmlShutdown=lambda: closed.append(True),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)

    def until_all_were_read():
        deadline = time.monotonic() + 60
        while used and time.monotonic() < deadline:
            time.sleep(0.01)

    report = profile(until_all_were_read, sources=("nvml",))
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
