"""Times on a GPU: by events, behind a delay that hides what the host needs to queue the work, and as a caller waits."""

import contextlib
import itertools
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bench import common
from qexport.errors import QexportError
from qexport.failures import one_line
from qexport.installed import onnxruntime
from qexport.profiling.timing import interleaved

DELAYS = (1_000_000, 20_000_000, 400_000_000)  # cycles, the first half a millisecond: the next one where a call took longer
MATRIX = 8192
COPY_BYTES = 1 << 30
MOST_SETS = 16
ROUNDS = (5, 40)  # at least and at most; in between so many that the slowest contender takes SECONDS
SECONDS = 0.2
NOTE_LENGTH = 200


@dataclass(frozen=True)
class Contender:
    """`calls` compute once each, every one on another set of inputs, and return before the device is done; `output` gives
    what the last call of a place in the list has found."""

    calls: list[Callable[[], object]]
    output: Callable[[int], torch.Tensor]

    def result(self, place: int = 0) -> torch.Tensor:
        self.calls[place]()
        return self.output(place)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def on_stream(device: str):
    """A context in which torch queues its work on a stream of its own: onnxruntime takes no default one from its caller."""
    return torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()


def device_ms(call) -> float:
    """Milliseconds between two events around the work of a call. Until the host has queued it the device is kept busy: where
    the host took longer, the time would be the host's, and the call is made again behind a longer delay."""
    for cycles in DELAYS:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        start.record()
        call()
        end.record()
        late = start.query()
        end.synchronize()
        if not late:
            return start.elapsed_time(end)
    raise QexportError(f"the host queues a call later than the device can wait, {DELAYS[-1]} cycles: no time of the device")


def waited_ms(call, device: str) -> float:
    """Milliseconds until a caller who waits for the result has it."""
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


@dataclass(frozen=True)
class Times:
    """Milliseconds of each round: of the device, and of a caller who waits."""

    device: np.ndarray
    waited: np.ndarray


def times_of(contenders: dict[str, Contender], device: str) -> dict[str, Times]:
    """Times of all of them, which take turns; every call takes the next set of inputs."""
    counter = itertools.count()

    def rotating(calls):
        return lambda: calls[next(counter) % len(calls)]()

    calls = {name: rotating(contender.calls) for name, contender in contenders.items()}
    if not calls:
        return {}
    for contender in contenders.values():  # every set once: the first call of a shape allocates
        for call in contender.calls:
            call()
    slowest = max(waited_ms(call, device) for call in calls.values())
    rounds = int(np.clip(1e3 * SECONDS / max(slowest, 1e-3), *ROUNDS))
    stopwatch = device_ms if device == "cuda" else lambda call: waited_ms(call, device)
    on_device = interleaved(calls, rounds, stopwatch=stopwatch)
    waited = interleaved(calls, rounds, stopwatch=lambda call: waited_ms(call, device))
    return {name: Times(on_device[name], waited[name]) for name in calls}


def number_of_sets(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs are twice what the cache holds, so that none is in it when its turn comes; up to MOST_SETS."""
    return int(np.clip(-(-2 * cache_bytes // max(set_bytes, 1)), 2, MOST_SETS))


def cache_bytes(device: str) -> int:
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0


def time_columns(times: Times | None, flops: float | None, moved: int) -> dict:
    """Microseconds, and the rates that they mean for `flops` operations and `moved` bytes."""
    if times is None:
        columns = ("us", "us_p25", "us_p75", "call_us", "rounds", "tflops", "gb_per_s")
        return dict.fromkeys(columns)
    low, median, high = (1e3 * float(x) for x in np.percentile(times.device, [25, 50, 75]))
    row = {"us": median, "us_p25": low, "us_p75": high, "call_us": 1e3 * float(np.median(times.waited))}
    row |= {"rounds": len(times.device), "tflops": 1e-6 * flops / median if flops else None}
    return row | {"gb_per_s": 1e-3 * moved / median}


def rival_columns(times: dict[str, Times], name: str, rivals: dict[str, str]) -> dict:
    """Column -> how many times as long that rival takes on the device, with quartiles, and `_call` for who waits."""
    row = {}
    for column, rival in rivals.items():
        if name in times and rival in times and rival != name:
            row |= common.ratio(column, times[rival].device, times[name].device)
            row[f"{column}_call"] = float(np.median(times[rival].waited / times[name].waited))
        else:
            row |= dict.fromkeys((column, f"{column}_p25", f"{column}_p75", f"{column}_call"))
    return row


def compared(makers: dict, check, work, rivals: dict[str, str], base: dict, device: str) -> list[dict]:
    """One row per contender of `makers`, name -> function that makes it: checked, then timed in turn with the others.

    Args:
        check: (name, contender) -> columns of the row, and "" or what is wrong with its output, which then is not timed.
        work: name -> (floating-point operations or None, bytes that must be moved).
        rivals: columns as `rival_columns` takes them.
        base: columns that all rows begin with.
        device: `cuda`, or `cpu` to try the program itself.

    Whoever cannot be made, fails or is wrong has a row all the same, whose `note` says what happened.
    """
    found, columns, notes = {}, {}, {}
    for name, make in makers.items():
        try:
            contender = make()
            columns[name], notes[name] = check(name, contender)
            if not notes[name]:
                found[name] = contender
        except Exception as error:  # whatever the programs of others raise
            notes[name] = one_line(f"{type(error).__name__}: {error}", NOTE_LENGTH)
            synchronize(device)  # a device that is broken now ends the case
    times = times_of(found, device)
    keys = dict.fromkeys(key for row in columns.values() for key in row)
    rows = []
    for name in makers:
        row = base | {"contender": name} | time_columns(times.get(name), *work(name))
        row |= rival_columns(times, name, rivals) | dict.fromkeys(keys) | columns.get(name, {})
        rows.append(row | {"note": notes.get(name, "")})
    return rows


def describe(device: str) -> dict:
    """The card, its driver, and the versions of what runs on it."""
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "onnxruntime": onnxruntime().__version__}
    if device != "cuda":
        return {"card": device, "driver": None} | found
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.split()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        driver = None
    found["multiprocessors"], found["l2_mb"] = properties.multi_processor_count, properties.L2_cache_size / 2**20
    return {"card": properties.name, "driver": driver} | found


def ceilings(device: str) -> dict:
    """What the card does at best, in this run: copied bytes (read and written) and products of MATRIX x MATRIX matrices;
    and what the events show where there is no work between them."""
    scale = 1 if device == "cuda" else 16
    side = MATRIX // scale
    source = torch.zeros(COPY_BYTES // scale**2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {"nothing": lambda: None, "copy": lambda: target.copy_(source)}
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype in (torch.float16, torch.float32):
        a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
        calls[str(dtype)] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
    stopwatch = device_ms if device == "cuda" else lambda call: waited_ms(call, device)
    ms = {name: float(np.median(x)) for name, x in interleaved(calls, 20, warmup=3, stopwatch=stopwatch).items()}
    found = {"no_work_us": 1e3 * ms["nothing"], "copy_gb_per_s": 2e-6 * source.nbytes / ms["copy"]}
    return found | {f"{t}_tflops": 2e-9 * side**3 / ms[f"torch.{t}"] for t in ("float16", "float32")}


def with_ceilings(row: dict, ceilings: dict) -> dict:
    """The row with the shares of the ceilings that its rates are, in percent, behind them."""
    peak = ceilings.get("float32_tflops" if row.get("dtype") == "float32" else "float16_tflops")
    rates = {"tflops": ("percent_of_matmul", peak), "gb_per_s": ("percent_of_copy", ceilings.get("copy_gb_per_s"))}
    result = {}
    for key, value in row.items():
        result[key] = value
        if key in rates:
            column, ceiling = rates[key]
            result[column] = 100 * value / ceiling if value is not None and ceiling else None
    return result
