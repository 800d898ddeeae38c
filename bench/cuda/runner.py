"""Cases one after the other in a process of their own: what fails, hangs or breaks the device costs its own case only."""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass

from qexport.failures import one_line

START_SECONDS = 120  # until a process has loaded its programs
CASE_SECONDS = 60  # until a case counts as hung


@dataclass(frozen=True)
class Case:
    """Rows of a table: `function(*arguments, device)`."""

    table: str
    name: str
    function: Callable
    arguments: tuple = ()


def run(make_cases: Callable[[], list[Case]], device: str, seconds: float, say=print) -> tuple[dict, list[dict]]:
    """All cases' rows by table, and one entry for each that failed or was left out.

    Args:
        make_cases: called in this process and in every other; a function of a module or a partial of one.
        device: handed to the cases.
        seconds: when they have passed, the rest is left out, and a case that is under way is ended.
        say: called with a line per case.
    """
    cases, tables, failures = make_cases(), {}, []
    start, left = time.monotonic(), list(range(len(cases)))

    def passed() -> float:
        return time.monotonic() - start

    def record(case, rows, error, outcome):
        tables.setdefault(case.table, []).extend(rows or [])
        if error:
            failures.append({"table": case.table, "case": case.name, "error": error})
        say(f"[{passed():5.1f} s] {case.table}, {case.name}: {error or outcome}")
        for row in rows or []:
            say(f"{'':10}{_line(row)}")

    while left and passed() < seconds:
        worker = _Worker(make_cases, device, left)
        while left and passed() < seconds:
            begun = passed()
            rows, error = worker.next(min(CASE_SECONDS, seconds - begun))
            record(cases[left.pop(0)], rows, error, f"{passed() - begun:.1f} s")
            if worker.ended:
                break
        worker.close()
    for i in left:
        record(cases[i], None, "left out: no time left", "")
    return tables, failures


def _line(row: dict) -> str:
    """The figures of a row that a reader looks for first."""
    rivals = ("x_flash", "x_own_flash", "x_gqa", "x_torch_flash", "x_other")
    shown = ("us", "call_us", "tflops", "gb_per_s", *rivals, "error", "error_mean")
    figures = [f"{key} {row[key]:.4g}" for key in (*shown, "error_worst") if row.get(key) is not None]
    return f"{row.get('contender', '')}: {', '.join(figures)} {row.get('note', '')}".rstrip()


class _Worker:
    """A process that works through the cases `left`; `ended` once it will not go on."""

    def __init__(self, make_cases, device, left):
        context = multiprocessing.get_context("spawn")  # a fork would inherit a runtime of CUDA that it cannot use
        self._pipe, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(make_cases, device, list(left), theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.ended = False
        self._greeting = self.next(START_SECONDS)

    def next(self, seconds: float):
        """(rows, None) of the next case, or (None, error)."""
        if self.ended:  # it has not even started
            return self._greeting
        if not self._pipe.poll(seconds):
            self.ended = True
            return None, f"no answer in {seconds:.0f} s"
        try:
            rows, error, self.ended = self._pipe.recv()
        except EOFError:
            self._process.join()
            self.ended = True
            return None, f"its process ended with code {self._process.exitcode}"
        return rows, error

    def close(self):
        self._process.kill()
        self._process.join()


def _work(make_cases, device, left, pipe):
    from bench.cuda.measure import on_stream, synchronize

    cases = make_cases()
    pipe.send((None, None, False))
    with on_stream(device):
        for i in left:
            case, rows, error, broken = cases[i], None, None, False
            try:
                rows = case.function(*case.arguments, device)
            except Exception as raised:  # whatever the programs of others raise
                error = one_line(f"{type(raised).__name__}: {raised}")
                try:
                    synchronize(device)
                except Exception:  # the device is no use to this process any more
                    broken = True
            pipe.send((rows, error, broken))
            if broken:
                return
