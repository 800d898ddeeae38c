"""Leaks of a running program: planted ones are found, in Python and behind its back; honest programs are left in peace."""

import ctypes
import gc
import mmap
from functools import lru_cache

import numpy as np
import pytest
from bundle_factory import make_bundle
from memory_cases import LINUX, alone

from qexport import session
from qexport.memory import AdvancedMemoryProfiler
from qexport.memory.counters import find
from qexport.profiling.calls import make_call

CALLS = 2000  # within which a leak of 1 KiB a call must be found
KB = 1024


def watched(step, calls=CALLS, sources=("tracemalloc", "malloc", "rss")) -> dict:
    """What the profiler found in so many calls of `step(i)`."""
    profiler = AdvancedMemoryProfiler(sources=sources)
    for i in range(calls):
        with profiler.profile_block("step"):
            step(i)
    return profiler.generate_report().block("step")


def verdict(step, calls=CALLS, sources=("tracemalloc", "malloc", "rss")) -> dict:
    """What the profiler says of them."""
    return watched(step, calls, sources)["leak"]


def needs(source):
    absent = find([source])[1].get(source)
    return pytest.mark.skipif(absent is not None, reason=f"{source}: {absent}")


def churn(rng):
    """A program that makes and drops arrays and objects of all sizes, keeps the last 20 and leaves cycles behind."""
    recent = [None] * 20

    def step(i):
        recent[i % 20] = np.empty(int(rng.integers(1, 20_000)), np.uint8)
        words = [str(i)] * int(rng.integers(1, 50))
        cycle = [words]
        cycle.append(cycle)
        return {j: bytes(j) for j in range(int(rng.integers(1, 20)))}

    return step


@pytest.mark.parametrize("seed", range(5))
@alone
def test_a_planted_leak_of_one_kibibyte_a_call(seed):
    kept, step = [], churn(np.random.default_rng(seed))

    def leaky(i):
        step(i)
        kept.append(bytes(KB))

    found = watched(leaky)
    assert found["leak"]["verdict"] == "leak", found
    assert found["leak"]["p_value"] < found["leak"]["level"], found
    rates = found["counters"]["tracemalloc"]["leak"]["bytes_per_call"]  # which hardly depends on what was read when
    assert np.mean(rates) == pytest.approx(KB, rel=0.2), found


@needs("malloc")
@alone
def test_a_leak_that_python_does_not_see():
    """From malloc, as a library would leak it; tracemalloc has no part in it."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = (ctypes.c_void_p * CALLS)()

    def leaky(i):
        blocks[i] = libc.malloc(KB)

    found = verdict(leaky)
    assert (found["verdict"], found["counter"]) == ("leak", "malloc"), found
    for block in blocks:
        libc.free(block)


@pytest.mark.parametrize("kept", [None, []])
@alone
def test_many_short_calls(kept):
    """Most of them are not read, but every counter has readings enough."""
    churning = churn(np.random.default_rng(0))

    def step(i):
        churning(i)
        if kept is not None:
            kept.append(bytes(KB))

    found = watched(step, 20_000, ("tracemalloc", "malloc"))
    verdicts = {name: figures["leak"]["verdict"] for name, figures in found["counters"].items()}
    assert set(verdicts.values()) == {"no leak" if kept is None else "leak"}, found


@alone
def test_no_false_alarm_in_twenty_clean_runs():
    found = [verdict(churn(np.random.default_rng(seed)), 500) for seed in range(20)]
    assert {one["verdict"] for one in found} == {"no leak"}, found


@alone
def test_a_model_that_runs_is_clean(tmp_path):
    opened = session(make_bundle(tmp_path / "bundle"), library=False)
    feed = {"input_ids": np.zeros((1, 16), np.int64), "attention_mask": np.ones((1, 16), np.int64)}
    call = make_call(opened, feed, [])
    assert verdict(lambda i: call(), 1500)["verdict"] in ("no leak", "slows down")


@alone
def test_a_cache_is_no_leak():
    @lru_cache(maxsize=500)
    def remembered(key):
        return bytes(KB)

    assert verdict(remembered)["verdict"] == "no leak"
    keys = np.random.default_rng(1).integers(0, 400, CALLS).tolist()
    remembered.cache_clear()
    assert verdict(lambda i: remembered(keys[i]))["verdict"] in ("no leak", "slows down")


@LINUX
@pytest.mark.parametrize(("calls", "expected"), [(240, "no leak"), (CALLS, "leak")])
@alone
def test_pages_of_old_memory_that_each_call_uses_for_the_first_time(calls, expected):
    """Less than a MiB of them is what allocators do with what they hold; nobody but the system counts them."""
    with mmap.mmap(-1, calls * mmap.PAGESIZE) as block:

        def step(i):
            block[i * mmap.PAGESIZE] = 1

        found = verdict(step, calls)
    assert found["verdict"] == expected, found
    assert found["counter"] == "rss", found


@alone
def test_a_warm_up_is_no_leak():
    kept = []
    assert verdict(lambda i: kept.append(bytes(KB)) if i < 400 else None)["verdict"] == "no leak"


@alone
def test_garbage_that_waits_for_the_collector_is_no_leak():
    def step(i):
        cycle = [bytes(KB)]
        cycle.append(cycle)

    gc.collect()
    gc.disable()
    try:
        found = verdict(step, sources=("tracemalloc",))
    finally:
        gc.enable()
    assert found["verdict"] == "garbage", found


@alone
def test_the_profiler_does_not_grow():
    """Not in itself, which would be found as a leak of every block, and not with blocks that nest."""
    profiler = AdvancedMemoryProfiler(sources=("tracemalloc", "malloc"))
    for _ in range(CALLS):
        with profiler.profile_block("outer"), profiler.profile_block("inner"):
            pass
    report = profiler.generate_report()
    for path in (("outer",), ("outer", "inner")):
        entry = report.block(*path)
        assert entry["leak"]["verdict"] == "no leak"
    # the first call of the outer block holds what the profiler sets up for the inner one
    assert abs(entry["counters"]["tracemalloc"]["left_bytes"]) < 4 * KB


@alone
def test_too_few_calls_say_so():
    found = verdict(lambda i: None, 10)
    assert (found["verdict"], found["p_value"]) == ("too few readings", None), found
