"""What the memory profiler costs, and how often its verdict on leaks is right.

    python -m bench.memory [--runs 20] [--json FILE]

`cost`: processor time that `profile_block` adds to a call, by what is read: to one that makes and drops an array of 8 kB
and is over in microseconds, and to one of 10 ms (a product of matrices, after 200 of them), whose share is what a user sees.
Python's own work is slower while tracemalloc watches it; that is part of the time. Each row is a process of its own.
`verdicts`: so many runs of a program that makes, keeps for a while and drops arrays and objects of all sizes, as it is, and
with 1 KiB a call planted in Python or in malloc: how many were called a leak, and their largest p-value. Each run is a
process of its own.
"""

import ctypes
import json
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context

import numpy as np

from bench import common
from qexport.memory import AdvancedMemoryProfiler
from qexport.memory.counters import DEFAULT

CALLS = 2000  # of which the cost is measured
LENGTHS = (500, 2000, 20_000)
SOURCES = {"nothing": (), "tracemalloc": ("tracemalloc",), "malloc": ("malloc",), "rss": ("rss",), "all by default": DEFAULT}


def small():
    """A call of microseconds."""
    np.ones(1000)


def long():
    """A call of some 10 ms."""
    matrix @ matrix


matrix = np.ones((640, 640))


def per_call(step, calls: int, profiler: AdvancedMemoryProfiler | None) -> float:
    """Processor seconds of this process per call."""
    start = time.process_time()
    for _ in range(calls):
        if profiler:
            with profiler.profile_block("step"):
                step()
        else:
            step()
    return (time.process_time() - start) / calls


def cost(sources) -> dict:
    """Microseconds that a block adds to a small call, and the share that it adds to one of 10 ms."""
    plain = min(per_call(small, CALLS, None) for _ in range(3))
    profiler = AdvancedMemoryProfiler(sources=sources)
    per_call(small, 100, profiler)
    watched = min(per_call(small, CALLS, profiler) for _ in range(3))
    profiler.generate_report()
    profiler = AdvancedMemoryProfiler(sources=sources)
    per_call(long, 200, profiler)
    pairs = np.array([[per_call(long, 30, one) for one in (None, profiler)] for _ in range(6)])
    long_plain, long_watched = np.median(pairs, axis=0)
    return {
        "small_call_us": 1e6 * plain,
        "added_us": 1e6 * (watched - plain),
        "long_call_ms": 1e3 * long_plain,
        "added_share": long_watched / long_plain - 1,
    }


PLANTED = {
    "none": lambda: None,
    "1 KiB a call in Python": lambda: kept.append(bytes(1024)),
    "1 KiB a call in malloc": lambda: libc.malloc(1024),
}
kept, libc = [], ctypes.CDLL(None)


def verdicts(runs: int) -> list[dict]:
    """Rows of runs with and without a planted leak."""
    rows = []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for name, calls in product(PLANTED, LENGTHS):
            found = list(pool.map(partial(_verdict, name, calls), range(runs)))
            leaks = [one["p_value"] for one in found if one["verdict"] == "leak"]
            others = sorted({one["verdict"] for one in found} - {"leak"})
            rows.append(
                {
                    "leak": name,
                    "calls": calls,
                    "runs": runs,
                    "called_leak": len(leaks),
                    "largest_p": max(leaks, default=None),
                    "else": ", ".join(others),
                }
            )
    return rows


def _verdict(name: str, calls: int, seed: int) -> dict:
    profiler, recent, leak = AdvancedMemoryProfiler(), [None] * 20, PLANTED[name]
    sizes = np.random.default_rng(seed).integers(1, 20_000, calls).tolist()
    for i, size in enumerate(sizes):
        with profiler.profile_block("step"):
            recent[i % 20] = np.empty(size, np.uint8)
            cycle = [[str(i)] * (size % 50)]
            cycle.append(cycle)
            leak()
    return profiler.generate_report().block("step")["leak"]


def main() -> None:
    """Measure and print."""
    arguments = common.parser(__doc__, runs=20).parse_args()
    rows = []
    for name in SOURCES:
        done = subprocess.run(
            [sys.executable, "-m", "bench.memory", "--cost", name], capture_output=True, text=True, check=True
        )
        rows.append({"reads": name, **json.loads(done.stdout)})
    tables = {"cost": rows, "verdicts": verdicts(arguments.runs)}
    common.report("memory", arguments.threads, {"runs": arguments.runs}, tables, arguments.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cost"]:
        print(json.dumps(cost(SOURCES[sys.argv[2]])))
    else:
        main()
