"""The job on a target: `python -m qexport.remote.worker` in the folder that was sent runs job.json and writes JSON lines.

job.json: {"function", "arguments", "library", "feeds"}; the bundle lies in bundle/, the arrays of feeds in feeds/K.npz.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

from qexport.errors import QexportError, UsageError

FUNCTIONS = {"profile": "qexport.profiling", "validate": "qexport.validation"}


def main() -> None:
    """Run the job; what it finds is the line {"report"}, what fails {"error", "usage"}, and steps are {"progress"}."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print must not meet the answer

    def send(**message) -> None:
        print(json.dumps(message, allow_nan=False), file=out, flush=True)

    try:
        if Path(__file__).resolve().parents[2] != Path.cwd().resolve():
            raise QexportError("its Python has an editable install of qexport, which hides the copy; give another Python")
        report = perform(
            json.loads(Path("job.json").read_text(encoding="utf-8")), lambda step, done: send(progress=step, done=done)
        )
        send(report=report)
    except QexportError as error:
        send(error=str(error), usage=isinstance(error, UsageError))
    except Exception as error:  # the last boundary, as in qexport.cli
        send(error=f"internal error: {type(error).__name__}: {' '.join(str(error).split())}", usage=False)


def perform(job: dict, progress) -> dict:
    """The report of a job, as plain data."""
    arguments, name = job["arguments"], job["function"]
    if job["feeds"] is not None:
        arguments["data"] = read_feeds(job["feeds"])
    run = getattr(import_module(FUNCTIONS[name]), name)
    return run("bundle", library=job["library"], progress=progress, **arguments).to_dict()


def read_feeds(described: dict):
    """The `qexport.feeds.Inputs` that were sent."""
    import numpy as np

    from qexport.feeds import Inputs

    feeds = []
    for k in range(described["count"]):
        with np.load(f"feeds/{k}.npz", allow_pickle=False) as file:
            feeds.append({name: file[name] for name in file.files})
    return Inputs(feeds, described["source"], described["notes"])


if __name__ == "__main__":
    sys.exit(main())
