"""scaling: how time, memory and error of attention grow with the length, for every strategy and what it competes with.

`sweep` binds each contender to the same inputs, holds its output against float64, times all of them in turn, measures the
memory of one fresh call, and fits time ~ n^a. docs/json_schema.md explains every figure of the report.
"""

import gc
import math
import os
import time
from dataclasses import dataclass, field

import numpy as np
import psutil

from qexport import profiling
from qexport.arguments import real, several, whole, wholes
from qexport.documents import finite, make_document
from qexport.errors import QexportError, UsageError
from qexport.failures import one_line
from qexport.memory.rss import extra_rss
from qexport.plotting import check_plot
from qexport.profiling.timing import interleaved
from qexport.progress import listener, portion
from qexport.providers import CPU, full_names, provider_name, recorded
from qexport.runtime import check_start, check_threads
from qexport.scaling import plot as picture
from qexport.scaling import reference
from qexport.scaling.contenders import FAMILIES, Entry, entries
from qexport.scaling.fit import power_law, predicted
from qexport.scaling.inputs import Activations, Gaussian

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
RUNS = 5  # timed runs of each contender at each length, at least
QUICK_SECONDS = 0.2  # per contender: short lengths are run more often than RUNS for about so long
MOST_ROUNDS = 200
ROWS = 256  # queries whose error is measured, evenly spaced
OVERHEAD_RUNS = 20
ABOVE_OVERHEAD = 10  # times of so many overheads or more are fitted: what is left of it moves them by a tenth at most
MEMORY_SHARE = 0.8  # of the memory that is free: what a call may be expected to need


@dataclass
class ScalingReport:
    """What `sweep` measured: one entry of `contenders` each. `to_dict()` is the documented JSON."""

    settings: dict
    machine: dict
    versions: dict
    contenders: list[dict]
    left_out: list[dict]
    seconds: float

    def to_dict(self) -> dict:
        """The report as plain data."""
        return make_document("scaling", self.__dict__)


@dataclass
class _Run:
    """A contender on its way through the lengths."""

    entry: Entry
    overhead_ms: float
    rows: list[dict] = field(default_factory=list)
    stopped: dict | None = None

    def fit(self) -> dict | None:
        """Of the lengths whose time is above the overhead."""
        fitted = [(row["n"], row["ms"]) for row in self.rows if row["ms"] >= ABOVE_OVERHEAD * self.overhead_ms]
        return power_law(*zip(*fitted, strict=True)) if fitted else None

    def to_dict(self) -> dict:
        about = {"name": self.entry.name, "strategy": self.entry.family, "provider": self.entry.provider}
        return about | {"overhead_ms": self.overhead_ms, "fit": self.fit(), "lengths": self.rows, "stopped": self.stopped}


def sweep(
    lengths=LENGTHS,
    *,
    heads: int = 4,
    head_size: int = 64,
    causal: bool = False,
    threads: int = 1,
    strategies=None,
    activations=None,
    seconds: float = 5.0,
    providers=None,
    allow_fallback=False,
    plot=None,
    progress=None,
) -> ScalingReport:
    """Measure time, memory and error of attention against the length.

    Args:
        lengths: numbers of queries and keys.
        heads, head_size: of the inputs (1, heads, n, head_size), float32.
        causal: whether query i sees the keys up to i alone.
        threads: intra-op threads of onnxruntime and torch.
        strategies: keys of `FAMILIES`, strategies of the op and names of what it is compared with; all of them when None.
        activations: an .npz file with arrays q, k, v, (..., n, head_size) each; independent N(0, 1) when None.
        seconds: what the timed runs of one contender may take at one length. Who is expected to need more, or does, is
            stopped there, and the reason is in the report.
        providers: where it runs, as in `qexport.session`; the CPU when None. With CUDA first torch runs there too, inputs
            and outputs stay in the memory of the device, and a call ends when the device has done its work. Behind another
            provider than the CPU `memory_bytes` is None, since the memory of this process says nothing.
        allow_fallback: time nodes on the CPU, with the copies that it takes, that have no kernel on the provider asked for;
            else they are left out.
        plot: a .png, .svg or .pdf to draw the report to; needs matplotlib.
        progress: called with the step in words and the share that is done, 0 to 1.

    Raises:
        UsageError: a number outside its limits, an unknown strategy, a file with fewer heads or positions, or `providers` as
            in `qexport.session`.
        QexportError: a file does not hold such arrays, the runtime or a provider is at fault, or no contender is left.
    """
    start, say = time.perf_counter(), listener(progress)
    # torch's idle threads must not spin while another contender is timed; read once, when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    lengths = sorted(set(wholes("lengths", lengths)))
    for name, value in (("heads", heads), ("head_size", head_size)):
        whole(name, value)
    check_threads(whole("threads", threads))
    if not 0 < real("seconds", seconds) < math.inf:
        raise UsageError(f"seconds must be a positive number, got {seconds}")
    if plot is not None:
        check_plot(plot)
    where = {"providers": providers, "allow_fallback": allow_fallback}
    _check_room(lengths[-1], heads, head_size)
    check_start(**where)
    inputs = Gaussian(heads, head_size) if activations is None else Activations(activations, heads, lengths[-1])
    say("calling every attention once", 0.0)
    runs, left_out = _admitted(causal, where, strategies, inputs(1), threads)
    on_device = provider_name(full_names(providers)[0]) != CPU
    for number, n in enumerate(lengths):
        if all(run.stopped for run in runs):
            break
        tell = portion(say, number / len(lengths), (number + 1) / len(lengths))
        _measure(runs, n, inputs(n), threads, causal, seconds, activations is None and not causal, on_device, tell)
    settings = recorded(**where) | {
        "lengths": lengths,
        "heads": heads,
        "head_size": inputs.head_size,
        "causal": causal,
        "threads": threads,
        "strategies": list(strategies) if strategies is not None else list(FAMILIES),
        "inputs": "gaussian" if activations is None else str(activations),
        "seconds": seconds,
    }
    report = ScalingReport(
        settings,
        profiling.machine(),
        profiling.versions(),
        [run.to_dict() for run in runs],
        left_out,
        time.perf_counter() - start,
    )
    if plot is not None:
        picture.draw(report.to_dict(), plot)
    return report


def _check_room(n: int, heads: int, head_size: int) -> None:
    """Whether the inputs of length n, everybody's copies of them and the scores of the reference fit into memory."""
    copies, free = 4 * sum(len(family(False, {})) for family in FAMILIES.values()), psutil.virtual_memory().available
    needed = 4 * n * heads * head_size * copies + 3 * 8 * n * min(n, ROWS)
    if needed > MEMORY_SHARE * free:
        raise UsageError(
            f"lengths: the inputs of length {n} need about {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free; "
            "lower it, or the heads"
        )


def _reason(error: Exception) -> str:
    return one_line(error) or type(error).__name__


def _admitted(causal: bool, where: dict, strategies, inputs, threads: int) -> tuple[list[_Run], list[dict]]:
    """Who runs, with the time of a call on one key, which is all overhead; and who does not, with the reason."""
    for name in () if strategies is None else several("strategies", strategies):
        if name not in FAMILIES:
            raise UsageError(f"no strategy {name!r}; known: {', '.join(FAMILIES)}")
    runs, left_out = [], []
    for entry in entries(causal, where):
        if strategies is not None and entry.family not in strategies:
            continue
        reason = entry.absent
        if not reason:
            try:
                call = entry.make(*inputs, threads, causal).call
                ms = interleaved({entry.name: call}, OVERHEAD_RUNS, warmup=3)[entry.name]
                runs.append(_Run(entry, float(np.median(ms))))
            except ImportError as error:
                reason = f"{error.name or entry.provider} is not installed: pip install {entry.provider}"
            except Exception as error:  # whatever the programs of others raise
                reason = _reason(error)
        if reason:
            left_out.append({"name": entry.name, "strategy": entry.family, "reason": reason})
    if not runs:
        raise QexportError("; ".join(f"{one['name']}: {one['reason']}" for one in left_out) or "no strategy was asked for")
    return runs, left_out


def _measure(
    runs: list[_Run], n: int, inputs, threads: int, causal: bool, seconds: float, bounded: bool, on_device: bool, say
) -> None:
    """Add a row of length n to every run that is not stopped; stop those that are too slow or too large."""
    rows = reference.rows_of(n, ROWS)
    expected = reference.attention(*inputs, rows, causal)
    found, calls = {}, {}
    left = [run for run in runs if run.stopped is None]
    for number, run in enumerate(left):
        name = run.entry.name
        say(f"length {n}: {name}", 0.5 * number / len(left))
        try:
            contender = _tried(run, n, inputs, threads, causal, seconds)
        except _TooMuchError as reason:
            run.stopped = {"n": n, "reason": str(reason)}
            continue
        errors = reference.head_errors(contender.output()[:, :, rows], expected)
        bound = reference.gaussian_bound(run.entry.keys(n), n) if bounded and run.entry.keys else None
        found[name] = {
            "error_mean": finite(float(errors.mean())),
            "error_worst": finite(float(errors.max())),
            "bound": bound,
        }
        calls[name] = contender.call
    say(f"length {n}: timing {len(calls)} attentions in turn", 0.5)
    times = _timed(calls)
    contender = calls = None  # their memory is free before that of others is measured
    left = [run for run in left if run.stopped is None]
    for number, run in enumerate(left):
        say(f"length {n}: memory of {run.entry.name}", 0.75 + 0.25 * number / len(left))
        ms = times[run.entry.name]
        low, median, high = (float(x) for x in np.percentile(ms, [25, 50, 75]))
        row = {"n": n, "ms": median, "ms_p25": low, "ms_p75": high, "runs": len(ms)} | found[run.entry.name]
        run.rows.append(row | {"memory_bytes": None if on_device else _memory(run.entry, inputs, threads, causal)})


class _TooMuchError(Exception):
    """Why a contender ends at a length, in one line."""


def _tried(run: _Run, n: int, inputs, threads: int, causal: bool, seconds: float):
    """The contender at length n after its first call.

    Raises:
        _TooMuchError: it would be too slow or need too much memory by the shorter lengths, was too slow, or failed.
    """
    ms = predicted([(row["n"], row["ms"]) for row in run.rows], n, run.fit())
    if ms is not None and RUNS * ms > 1e3 * seconds:
        expected = f"{RUNS} calls would take {RUNS * ms / 1e3:.3g} s by the shorter lengths"
        raise _TooMuchError(f"{expected}, more than {seconds:g} s")
    needed = predicted([(row["n"], row["memory_bytes"]) for row in run.rows if row["memory_bytes"] is not None], n, None)
    free = psutil.virtual_memory().available
    if needed is not None and needed > MEMORY_SHARE * free:
        raise _TooMuchError(f"a call could need {needed / 1e9:.3g} GB by the last length, and {free / 1e9:.3g} GB are free")
    try:
        contender = run.entry.make(*inputs, threads, causal)
        start = time.perf_counter()
        contender.call()
        took = time.perf_counter() - start
    except Exception as error:  # whatever the programs of others raise
        raise _TooMuchError(_reason(error)) from error
    if RUNS * took > seconds:
        raise _TooMuchError(f"a call took {took:.3g} s; {RUNS} of them are more than {seconds:g} s")
    return contender


def _timed(calls: dict) -> dict[str, np.ndarray]:
    """Times in milliseconds of RUNS rounds, and of more where they are short."""
    times = interleaved(calls, RUNS, warmup=0)
    spent = sum(float(ms.sum()) for ms in times.values()) / 1e3
    more = min(MOST_ROUNDS, int(RUNS * QUICK_SECONDS * len(calls) / spent) - RUNS) if calls else 0
    if more <= 0:
        return times
    again = interleaved(calls, more, warmup=0)
    return {name: np.concatenate([ms, again[name]]) for name, ms in times.items()}


def _memory(entry: Entry, inputs, threads: int, causal: bool) -> int | None:
    """Bytes that one call needs beside its inputs and its output: by how much it raises the memory of this process.

    The contender is a fresh one, whose runtime holds no memory yet, and the program it runs is loaded already.
    """
    fresh = entry.make(*inputs, threads, causal)
    collects = gc.isenabled()
    gc.disable()  # what is collected while it runs would make up for what it takes
    try:
        extra = extra_rss(fresh.call)
    finally:
        if collects:
            gc.enable()
    return None if extra is None else max(0, extra - fresh.allocates)
