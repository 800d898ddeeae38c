"""Where memory goes: peaks, trends, leaks and efficiency of named blocks of a program.

    profiler = AdvancedMemoryProfiler()
    with profiler.profile_block("attention"):
        output = attention(Q, K, V)
    print(profiler.generate_report().to_text())

docs/memory.md says what each source sees, what the figures mean and what measuring costs.
"""

import gc
import threading
import time
from contextlib import contextmanager
from contextvars import ContextVar

from qexport.arguments import real, several
from qexport.errors import QexportError, UsageError
from qexport.memory import arena, counters
from qexport.memory.blocks import Account, Block, Call
from qexport.memory.report import MemoryReport, make_report
from qexport.memory.series import Series

__all__ = ["AdvancedMemoryProfiler", "MemoryReport"]

IDLE_SECONDS = 1.0  # without an open block, after which the sampling thread ends
TIMELINE = 512


class AdvancedMemoryProfiler:
    """Watches the memory of this process, and of its GPUs, in named blocks.

    Blocks may nest and may run in several threads; a name that is used again is the same block, called once more. Memory
    belongs to the process, so a block counts what other threads do meanwhile; the report says how many calls were so.
    A report covers the blocks since the last one. It holds a fixed amount of memory per block.

    Args:
        sources: names of `qexport.memory.counters.SOURCES`; by default all but "torch_cpu", which slows torch down. The
            report names those that are not there, with the reason.
        interval: seconds between two looks of the thread that samples while a block is open.
        overhead: the share of the time that reading counters may take; each of them gets an equal part, and is read less
            often where that is not enough.

    Raises:
        UsageError: an unknown source, an interval that is not above 0, or an overhead outside 0..1.
    """

    def __init__(self, *, sources=counters.DEFAULT, interval: float = 0.01, overhead: float = 0.02):
        sources = tuple(several("sources", sources))
        unknown = [name for name in sources if name not in counters.SOURCES]
        if unknown:
            raise UsageError(f"no source of memory figures {unknown[0]!r}; there are {', '.join(counters.SOURCES)}")
        if not real("interval", interval) > 0:
            raise UsageError(f"interval must be > 0 seconds, got {interval}")
        if not 0 < real("overhead", overhead) <= 1:
            raise UsageError(f"overhead must be a share in 0..1, got {overhead}")
        self._sources, self._interval, self._overhead = sources, interval, overhead
        self._lock = threading.Lock()
        self._current = ContextVar("call", default=None)  # that the running thread or task is in
        self._sessions: list[arena.Watched] = []
        self._reset()

    def _reset(self) -> None:
        self._open: list[Call] = []
        self._blocks: dict[tuple[str, ...], Block] = {}
        self._counters: list[counters.Counter] = []
        self._absent: dict[str, str] = {}
        self._start: int | None = None  # ns on the clock of the system, as onnxruntime's trace has it
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._timelines: dict[str, Series] = {}
        self._busy = 0.0  # processor seconds spent in here

    @contextmanager
    def profile_block(
        self, name: str, *, tokens: int | None = None, minimum_bytes: int | None = None, reference_bytes: int | None = None
    ):
        """Watch the block of a `with` statement; gives the block, whose three figures may also be set inside.

        Args:
            name: of the block; inside another one it becomes part of that one.
            tokens: what one call works on, for bytes per token.
            minimum_bytes: what any way to compute the same must hold, for the overhead over it.
            reference_bytes: what the way that this one is compared with needs, for the compression ratio.

        Raises:
            UsageError: a figure that is not above 0.
        """
        given = {"tokens": tokens, "minimum_bytes": minimum_bytes, "reference_bytes": reference_bytes}
        for key, value in given.items():
            if value is not None and not real(key, value) > 0:
                raise UsageError(f"{key} of block {name!r} must be > 0, got {value}")
        call, start = self._enter(str(name), self._current.get())
        token = self._current.set(call)
        for key, value in given.items():
            if value is not None:
                setattr(call.block, key, value)
        try:
            yield call.block
        finally:
            self._current.reset(token)
            self._exit(call, start)

    def watch(self, session) -> None:
        """Count the arenas of an onnxruntime session too. The report ends the profiling of the session and reads its trace.

        Raises:
            UsageError: the session was opened without `SessionOptions.enable_profiling`.
        """
        self._sessions.append(arena.Watched(session))

    def generate_report(self) -> MemoryReport:
        """What the blocks since the last report did; ends the profiling of watched sessions.

        Raises:
            QexportError: a block is still open, or a trace cannot be read.
        """
        with self._lock:
            if self._open:
                raise QexportError(f"block {'/'.join(self._open[-1].block.path)!r} is still open: report when it has ended")
            thread, self._thread = self._thread, None
        self._ended.set()
        if thread:
            thread.join()
        garbage = self._collect()
        sessions, self._sessions = self._sessions, []
        arenas, reason = arena.read(sessions)
        absent = self._absent | ({"onnxruntime": reason} if reason else {})
        seconds = (time.time_ns() - self._start) / 1e9 if self._start else 0.0
        report = make_report(
            blocks=list(self._blocks.values()),
            counters=self._counters,
            absent=absent,
            timelines=self._timelines,
            start_ns=self._start or 0,
            garbage=garbage,
            arenas=arenas,
            settings={"sources": list(self._sources), "interval": self._interval, "overhead": self._overhead},
            overhead={"seconds": self._busy, "share": self._busy / seconds if seconds else 0.0},
            seconds=seconds,
        )
        counters.close(self._counters)
        self._reset()
        return report

    def _collect(self) -> dict[str, int]:
        """Collect garbage; the bytes that each counter fell by."""
        before = {c.name: c.read()[0] for c in self._counters}
        gc.collect()
        after = {c.name: c.read()[0] for c in self._counters}
        return {name: before[name] - after[name] for name in before if None not in (before[name], after[name])}

    def _now(self) -> int:
        """Nanoseconds on the system's clock, without its jumps."""
        return time.perf_counter_ns() + self._clock

    def _enter(self, name: str, parent: Call | None) -> tuple[Call, int]:
        began = time.thread_time()
        with self._lock:
            if self._start is None:
                self._begin_period()
            path = (*parent.block.path, name) if parent else (name,)
            block = self._blocks.get(path)
            if block is None:
                block = self._blocks[path] = Block(path, self._counters)
            call = Call(block, parent)
            for other in self._open:
                if not call.inside(other):
                    call.overlapped = other.overlapped = True
            for counter in self._counters:
                found = self._read(counter, block.account) if counter.every_call else None
                if found is not None:
                    call.begin(counter, *found)
            if not self._open:
                for counter in self._counters:
                    if counter.begin:
                        counter.begin()
            self._open.append(call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._sample, name="qexport-memory", daemon=True)
                self._thread.start()
            self._busy += time.thread_time() - began
            return call, self._now()

    def _begin_period(self) -> None:
        self._clock = time.time_ns() - time.perf_counter_ns()
        self._start = self._now()
        self._counters, self._absent = counters.find(self._sources)
        self._share = self._overhead / max(1, len(self._counters))
        self._timelines = {c.name: Series(TIMELINE, max) for c in self._counters}

    def _exit(self, call: Call, start: int) -> None:
        end = self._now()
        began = time.thread_time()
        with self._lock:
            if len(self._open) == 1:
                for counter in self._counters:
                    if counter.end:
                        counter.end()
            for counter in self._counters:
                if counter.name in call.before and (not counter.every_call or self._read(counter, call.block.account)):
                    call.at_end.append(counter.name)
            self._open.remove(call)
            call.end(start, end)
            self._busy += time.thread_time() - began

    def _read(self, counter: counters.Counter, account: Account) -> tuple[int, int | None, bool] | None:
        """Bytes now, the high-water mark and whether it begins anew from here; None where it is not read. The calls that are
        open see what was read."""
        if not account.affords(counter.name, self._share):
            return None
        began = time.thread_time()
        now, mark = counter.read()
        if now is None:
            return None
        forgotten = bool(counter.reset and counter.reset())
        account.pay(counter.name, time.thread_time() - began)
        self._tell(counter, now, mark)
        return now, mark, forgotten

    def _tell(self, counter: counters.Counter, now: int, mark: int | None) -> None:
        for call in self._open:
            call.see(counter, now, mark)
        self._timelines[counter.name].append(self._now() - self._start, now)

    def _sample(self) -> None:
        """The thread: a look every `interval` while a block is open, or less often where looks take more than their share of
        the time. It ends when it is told to, or long idle."""
        me, ended, account, idle = threading.current_thread(), self._ended, Account(allowance=0), 0.0
        while not ended.wait(self._interval):
            with self._lock:
                if self._thread is not me:
                    return
                idle = 0.0 if self._open else idle + self._interval
                if idle > IDLE_SECONDS:
                    self._thread = None
                    return
            if idle:
                continue
            if account.affords("look", self._overhead):
                began = time.thread_time()
                self._look(account)
                account.pay("look", time.thread_time() - began)
            account.earn(self._interval)

    def _look(self, account: Account) -> None:
        began = time.thread_time()
        # some take longer than the end of a block may be kept waiting: those are read before the lock is taken
        slow = []
        for counter in self._counters:
            if not counter.every_call and account.affords(counter.name, self._share):
                start = time.thread_time()
                slow.append((counter, counter.read()))
                account.pay(counter.name, time.thread_time() - start)
        with self._lock:
            for counter, (now, mark) in slow:
                if now is not None:
                    self._tell(counter, now, mark)
            for counter in self._counters:
                if counter.every_call:
                    self._read(counter, account)
            self._busy += time.thread_time() - began
