"""Runs one model in a process of its own and prints its memory and load time as JSON: the program `python -m` runs.

A process keeps its peak for ever, so two models that share one cannot be told apart. The request comes as JSON on stdin:
{"model", "library", "providers", "threads", "feed": path of an .npz, "shared", "runs"}.
"""

import json
import sys
import time

import numpy as np

from qexport.errors import QexportError
from qexport.profiling.calls import make_call
from qexport.profiling.rss import current_rss, peak_rss
from qexport.runtime import onnxruntime, quiet_options, session


def measure(request: dict) -> dict:
    """Load and run the model; bytes resident before, after loading and at the peak, seconds to load, and `marks`: time and
    resident bytes when the session was opened, was loaded and had run."""
    options = quiet_options()
    if request["threads"]:
        options.intra_op_num_threads = request["threads"]
    with np.load(request["feed"], allow_pickle=False) as file:
        feed = {name: file[name] for name in file.files}
    onnxruntime()  # the runtime itself belongs to "before"
    # JSON turns the pairs (name, options) into lists, and onnxruntime takes tuples alone
    providers = [tuple(p) if isinstance(p, list) else p for p in request["providers"]]
    marks = {"open": _mark()}
    # what may fall back to the CPU was settled by the process that asks
    opened = session(request["model"], library=request["library"], providers=providers, options=options, allow_fallback=True)
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


def _mark() -> tuple[float, int | None]:
    """The system's monotonic clock, which all processes share, and the bytes resident now."""
    return time.monotonic(), current_rss()


def main() -> None:
    """Answer one request from stdin; an error is printed as {"error": one line}."""
    try:
        answer = measure(json.load(sys.stdin))
    except QexportError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
