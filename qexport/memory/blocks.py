"""Calls of a block while they run, and what is kept of them: a fixed amount per block, however often it is called."""

from qexport.memory.counters import Counter
from qexport.memory.series import Series

INTERVALS = 512
READINGS = 1024
# Seconds that reading one counter may take beyond its share of a block's time, so that short blocks are read as well.
ALLOWANCE = 0.02
# When that is used up it is read in some calls all the same, so many from any number of calls to its double, while a
# reading takes less than so many seconds: a leak of native memory shows in a program of short calls, for next to nothing.
LEAST_PER_DOUBLING, CHEAP = 32, 1e-3


class Account:
    """What reading counters may cost a block, or the thread that samples, and did cost it, in seconds of the processor.

    Args:
        allowance: seconds that reading one counter may take before its share is asked for.

    Attributes:
        calls, seconds: calls of the block, or looks of the thread, that have ended, and how long they took together.
    """

    def __init__(self, allowance: float):
        self.calls, self.seconds, self._allowance = 0, 0.0, allowance
        self._spent: dict[str, float] = {}
        self._readings: dict[str, int] = {}

    def affords(self, name: str, share: float) -> bool:
        """Whether a counter may be read again: always in the first call, then up to `share` of the time."""
        spent = self._spent.get(name, 0.0)
        if not self.calls or spent <= self._allowance + share * self.seconds:
            return True
        stride = max(1, 2 ** (self.calls.bit_length() - 1) // LEAST_PER_DOUBLING)
        return self.calls % stride == 0 and spent <= CHEAP * self._readings[name]

    def pay(self, name: str, seconds: float) -> None:
        """Reading that counter took so long."""
        self._spent[name] = self._spent.get(name, 0.0) + seconds
        self._readings[name] = self._readings.get(name, 0) + 1

    def earn(self, seconds: float) -> None:
        """A call has ended that took so long."""
        self.calls += 1
        self.seconds += seconds


class Figures:
    """What one counter showed in the calls of one block, in bytes.

    Attributes:
        before: at the start of the first call that was read, None while none was.
        after: at the end of the last one.
        peak: the most in any call; exact where `exact_peak`, else the most that was seen.
        rise: the most that a call rose above its own start.
        ends: bytes at the end of call number i.
    """

    def __init__(self):
        self.before: int | None = None
        self.after = self.peak = self.rise = 0
        self.exact_peak = False
        self.ends = Series(READINGS)

    def add(self, number: int, before: int, after: int, peak: int, exact: bool) -> None:
        """One more call."""
        if self.before is None:
            self.before = before
        self.after, self.rise = after, max(self.rise, peak - before)
        if peak > self.peak:
            self.peak, self.exact_peak = peak, exact
        self.ends.append(number, after)


class Block:
    """All calls of one block. `tokens`, `minimum_bytes` and `reference_bytes` may be set while a call runs."""

    def __init__(self, path: tuple[str, ...], counters: list[Counter]):
        self.path = path
        self.tokens: int | None = None
        self.minimum_bytes: int | None = None
        self.reference_bytes: int | None = None
        self.overlapped = 0
        self.account = Account(ALLOWANCE)
        # made before the first reading, so that they do not count as what the block left behind
        self.figures = {counter.name: Figures() for counter in counters}
        # when calls began and ended, in ns: of every call, or with more than fit of every `stride` calls together
        self.starts, self.ends = Series(INTERVALS, min), Series(INTERVALS, max)


class Call:
    """One call of a block that is open, inside the call `parent` or in none."""

    def __init__(self, block: Block, parent: "Call | None"):
        self.block, self.parent = block, parent
        self.overlapped = False
        self.before: dict[str, int] = {}
        self.last: dict[str, int] = {}
        self.peaks: dict[str, int] = {}
        self.marks: dict[str, int | None] = {}  # high-water marks at the start that could not be reset
        self.exact: set[str] = set()
        self.at_end: list[str] = []  # counters whose last reading was taken at the end

    def inside(self, other: "Call") -> bool:
        """Whether `other` is a parent of this call."""
        return self.parent is not None and (self.parent is other or self.parent.inside(other))

    def begin(self, counter: Counter, now: int, mark: int | None, forgotten: bool) -> None:
        """What a counter showed at the start; `forgotten` when its high-water mark begins anew."""
        self.before[counter.name] = self.last[counter.name] = self.peaks[counter.name] = now
        self.marks[counter.name] = None if forgotten else mark
        if forgotten:
            self.exact.add(counter.name)

    def see(self, counter: Counter, now: int, mark: int | None) -> None:
        """A reading while the call runs. A mark that has risen since the start was set by this call."""
        name = counter.name
        if name not in self.before:
            if counter.every_call:  # it was not read at the start, so nobody knows what a mark belongs to
                return
            self.begin(counter, now, None, False)
        at_start = self.marks[name]
        if mark is not None and (name in self.exact or (at_start is not None and mark > at_start)):
            self.exact.add(name)
            self.peaks[name] = max(self.peaks[name], mark)
        self.peaks[name] = max(self.peaks[name], now)
        self.last[name] = now

    def end(self, start_ns: int, end_ns: int) -> None:
        """Adds the call to its block."""
        block = self.block
        block.account.earn((end_ns - start_ns) / 1e9)
        number = block.account.calls
        block.overlapped += self.overlapped
        block.starts.append(number, start_ns)
        block.ends.append(number, end_ns)
        for name in self.at_end:
            exact = name in self.exact
            block.figures[name].add(number, self.before[name], self.last[name], self.peaks[name], exact)
