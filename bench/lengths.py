"""Whole models at the default recipe against themselves before conversion, length by length.

    python -m bench.lengths [--runs 60] [--json FILE]

all-MiniLM-L6-v2 and stories15M (causal), with one intra-op thread and with two. Both models run in one process, in turn;
threads sleep between runs; `x_classical` is how many times as long the classical one takes, the median over the rounds.
"""

import tempfile
from pathlib import Path

import numpy as np

import qexport
from bench import common
from bench.models import minilm_dir
from qexport.bundle import Bundle
from qexport.generated import generate
from qexport.profiling import CLASSICAL, CONVERTED
from qexport.profiling.calls import make_call
from qexport.profiling.timing import interleaved
from qexport.runtime import quiet_options

LENGTHS = {"minilm": (8, 16, 32, 64, 128, 256, 512), "stories15m": (8, 16, 32, 64, 128, 256)}


def table(folder: Path, name: str, runs: int) -> list[dict]:
    bundle = Bundle.open(folder)
    rows = []
    for threads in (1, 2):
        options = quiet_options(threads)
        # The idle threads of one model would take the cores from the other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        sessions = {
            CLASSICAL: qexport.session(bundle.classical_path, library=False, options=options),
            CONVERTED: qexport.session(bundle.model_path, options=options),
        }
        for length in LENGTHS[name]:
            feed = generate(bundle, batch=1, seq=length).feeds[0]
            calls = {which: make_call(session, feed, []) for which, session in sessions.items()}
            times = interleaved(calls, runs, warmup=5)
            row = {"model": name, "threads": threads, "n": length, "runs": runs}
            row |= {f"{which}_ms": float(np.median(ms)) for which, ms in times.items()}
            rows.append(row | common.ratio("x_classical", times[CLASSICAL], times[CONVERTED]))
    return rows


def main():
    arguments = common.parser(__doc__.split("\n")[0], runs=60).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, source in (("minilm", minilm_dir()), ("stories15m", "bench.models:stories15m")):
            qexport.convert(source, Path(folder) / name)
            rows += table(Path(folder) / name, name, arguments.runs)
    common.report("lengths", 2, {"recipe": "default"}, {"lengths": rows}, arguments.json)


if __name__ == "__main__":
    main()
