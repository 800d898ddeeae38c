"""Memory of one model, measured in processes of their own: the side that asks; memory_child.py is the one that answers."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from qexport.errors import QexportError
from qexport.profiling.timeline import RssTimeline

RUNS = 3
TIMEOUT = 600


def model_memory(path, library, providers, threads, feed, shared=(), figures: dict | None = None) -> dict:
    """Resident bytes before a model is loaded, after that and at the peak of `RUNS` runs, the seconds that loading took, the
    timeline of all that, and `profile`, the report of a memory profiler where it is asked for, else None.

    Args:
        path, library, providers, threads: of the session.
        feed: arrays of the inputs.
        shared: pairs (input, output) that lie in the same memory.
        figures: of the blocks "model" and "run", keyword arguments of `profile_block` each; asks for the profiler, which
            watches a second process, so that it costs nothing in the first.

    Raises:
        QexportError: the model does not run, or a process dies.
    """
    with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
        file = Path(folder) / "feed.npz"
        np.savez(file, **feed)
        request = {
            "model": str(path),
            "library": library,
            "providers": providers,
            "threads": threads,
            "feed": str(file),
            "shared": list(shared),
            "runs": RUNS,
            "figures": None,
        }
        answer, seen = _ask(request)
        report = _ask(request | {"figures": figures})[0] if figures else None
    return answer | {"timeline": seen.to_dict(answer.pop("marks")), "profile": report}


def _ask(request: dict) -> tuple[dict, RssTimeline]:
    """The child's answer, and its memory over time."""
    # the child finds the package where this process found it
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    path = request["model"]
    try:
        with (
            subprocess.Popen(
                [sys.executable, "-P", "-m", "qexport.profiling.memory_child"],
                **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
                text=True,
                env=environment,
            ) as child,
            RssTimeline(child.pid) as timeline,
        ):
            try:
                said, complaint = child.communicate(json.dumps(request), timeout=TIMEOUT)
            finally:
                child.kill()
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QexportError(f"{path}: its memory could not be measured: {error}") from error
    try:
        answer = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        reason = complaint.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise QexportError(f"{path}: its memory could not be measured: {reason[0]}") from None
    if "error" in answer:
        raise QexportError(answer["error"])
    return answer, timeline


def needed(memory: dict, *block: str) -> int | None:
    """The most that a block of an answer with `profile` rose above its start, by the counter that saw most."""
    entry = next(b for b in memory["profile"]["blocks"] if tuple(b["path"]) == block)
    counters = memory["profile"]["counters"]
    return (
        max((f["rise_bytes"] for name, f in entry["counters"].items() if counters[name]["own_process"]), default=0) or None
    )
