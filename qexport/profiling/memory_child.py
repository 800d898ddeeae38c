"""Runs one model in a process of its own and prints its memory and load time as JSON: the program `python -m` runs.

A process keeps its peak for ever, so two models that share one cannot be told apart. The request comes as JSON on stdin:
{"model", "library", "providers", "threads", "feed": path of an .npz, "shared", "runs", "figures"}. With `figures`, which are
the keyword arguments of `profile_block` for the blocks "model" and "run", a memory profiler watches, over more runs. Then no
trace is written: the runtime keeps it in memory, which would grow with every run.
"""

import json
import sys
import time

import numpy as np

from qexport.errors import QexportError
from qexport.installed import onnxruntime
from qexport.memory import AdvancedMemoryProfiler
from qexport.memory.rss import current_rss, peak_rss
from qexport.profiling.calls import make_call
from qexport.runtime import quiet_options, session

# Runs under the profiler: as many as a leak test likes, or until they have taken so long, but enough for a verdict.
MOST_RUNS, MOST_SECONDS, LEAST_RUNS = 1000, 10.0, 40


def measure(request: dict) -> dict:
    """Load and run the model; bytes resident before, after loading and at the peak, seconds to load, and `marks`: time and
    resident bytes when the session was opened, was loaded and had run."""
    load, feed = _prepare(request)
    marks = {"open": _mark()}
    opened = load()
    marks["loaded"] = _mark()
    call = make_call(opened, feed, request["shared"])
    for _ in range(request["runs"]):
        call()
    marks["done"] = _mark()
    return {
        "before_bytes": marks["open"][1],
        "loaded_bytes": marks["loaded"][1],
        "peak_bytes": peak_rss(),
        "load_seconds": marks["loaded"][0] - marks["open"][0],
        "marks": marks,
    }


def watch(request: dict) -> dict:
    """Load and run the model under a memory profiler; its report."""
    load, feed = _prepare(request)
    profiler, figures = AdvancedMemoryProfiler(), request["figures"]
    with profiler.profile_block("model", **figures["model"]):
        with profiler.profile_block("load"):
            opened = load()
        call = make_call(opened, feed, request["shared"])
        runs, end = 0, time.perf_counter() + MOST_SECONDS
        while runs < LEAST_RUNS or (runs < MOST_RUNS and time.perf_counter() < end):
            with profiler.profile_block("run", **figures["run"]):
                call()
            runs += 1
    return profiler.generate_report().to_dict()


def _prepare(request: dict):
    """A function that opens the session, and the feed."""
    options = quiet_options(request["threads"])
    with np.load(request["feed"], allow_pickle=False) as file:
        feed = {name: file[name] for name in file.files}
    onnxruntime()  # the runtime itself belongs to "before"

    def load():
        # what may fall back to the CPU was settled by the process that asks
        where = {"providers": request["providers"], "allow_fallback": True}
        return session(request["model"], library=request["library"], options=options, **where)

    return load, feed


def _mark() -> tuple[float, int | None]:
    """The system's monotonic clock, which all processes share, and the bytes resident now."""
    return time.monotonic(), current_rss()


def main() -> None:
    """Answer one request from stdin; an error is printed as {"error": one line}."""
    request = json.load(sys.stdin)
    try:
        answer = watch(request) if request["figures"] else measure(request)
    except QexportError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
