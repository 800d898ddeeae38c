"""The report of a memory profiler, made from its readings: plain data, text and a picture. docs/memory.md has every key."""

from dataclasses import dataclass

from qexport.documents import make_document
from qexport.memory import trend
from qexport.memory.arena import Arena
from qexport.memory.blocks import Block


@dataclass
class MemoryReport:
    """What a profiler found. The attributes are the keys of its JSON, which docs/memory.md describes.

    Attributes:
        settings: sources, interval and overhead that were asked for.
        seconds: from the first block to the report.
        overhead: seconds and share of the time that the profiler took itself.
        counters: what was read, name to place and what it covers.
        absent: sources that were not there, name to reason.
        timeline: of each counter, seconds and bytes.
        trends: of each counter, bytes per second with the 95 % interval.
        blocks: one dict per block, in the order in which they first began.
    """

    settings: dict
    seconds: float
    overhead: dict
    counters: dict
    absent: dict
    timeline: dict
    trends: dict
    blocks: list[dict]

    def to_dict(self) -> dict:
        """The report as plain data, ready for JSON."""
        return make_document("memory", self.__dict__)

    def block(self, *path: str) -> dict:
        """The entry of one block: its name, or the names from the outermost block to it.

        Raises:
            KeyError: there was no such block.
        """
        found = {tuple(entry["path"]): entry for entry in self.blocks}
        return found[path]

    def to_text(self) -> str:
        """The report for people, in lines."""
        from qexport.memory.text import report_text

        return report_text(self.to_dict())

    def plot(self, file) -> None:
        """Draw memory over time, and the peaks of the blocks, to a .png, .svg or .pdf.

        Raises:
            UsageError: another kind of file, or a folder that is not there.
            QexportError: matplotlib is not installed, or the file cannot be written.
        """
        from qexport.memory.plot import draw

        draw(self.to_dict(), file)


def make_report(*, blocks, counters, timelines, start_ns, garbage, arenas, **given) -> MemoryReport:
    """The report from what a profiler holds; `garbage` says by how much a collection let each counter fall."""
    described = {c.name: {"place": c.place, "covers": c.covers, "own_process": c.own_process} for c in counters}
    timeline = {}
    for name, series in timelines.items():
        times, values = series.pairs()
        timeline[name] = {"seconds": [t / 1e9 for t in times], "bytes": values}
    for arena in arenas:
        described[arena.name] = {"place": arena.place, "covers": "an arena of onnxruntime", "own_process": True}
        step = max(1, len(arena.nodes) // 512)
        points = arena.nodes[::step]
        timeline[arena.name] = {"seconds": [(t - start_ns) / 1e9 for t, _, _ in points], "bytes": [b for _, b, _ in points]}
    trends = {}
    for name, line in timeline.items():
        fit = trend.theil_sen(line["seconds"], line["bytes"])
        trends[name] = {"bytes_per_second": fit["slope"], "ci95": fit["ci95"], "readings": fit["readings"]}
    own = {c.name: c.least_growth for c in counters if c.own_process}
    entries = [_block(block, arenas, own, garbage) for block in blocks]
    return MemoryReport(counters=described, timeline=timeline, trends=trends, blocks=entries, **given)


def _block(block: Block, arenas: list[Arena], own: dict[str, int], garbage: dict[str, int]) -> dict:
    figures, tests = {}, {}
    for name, found in block.figures.items():
        if found.before is None:
            continue
        calls, ends = found.ends.pairs()
        fit = trend.theil_sen(calls, ends)
        if name in own:
            tests[name] = trend.leak_test(calls, ends, block.account.calls, own[name])
        figures[name] = {
            "before_bytes": found.before,
            "after_bytes": found.after,
            "left_bytes": found.after - found.before,
            "peak_bytes": found.peak,
            "rise_bytes": found.rise,
            "peak_is": "exact" if found.exact_peak else "sampled",
            "trend": {"bytes_per_call": fit["slope"], "ci95": fit["ci95"], "readings": fit["readings"]},
            "leak": _collected(tests[name], calls, garbage.get(name, 0)).to_dict() if name in own else None,
        }
    figures |= _arena_figures(block, arenas)
    return {
        "path": list(block.path),
        "calls": block.account.calls,
        "overlapped_calls": block.overlapped,
        "seconds": block.account.seconds,
        "counters": figures,
        "leak": _verdict(tests),
        "efficiency": _efficiency(block, {name: figures[name]["rise_bytes"] for name in figures if name in own}),
    }


def _collected(test: trend.LeakTest, calls: list[int], freed: int) -> trend.LeakTest:
    """Growth of which a garbage collection gave back half or more was no leak."""
    if test.verdict == trend.LEAK:
        growth = sum(test.bytes_per_call) / 3 * (calls[-1] - calls[len(calls) // 4])
        if freed >= growth / 2:
            test.verdict = trend.GARBAGE
    return test


def _verdict(tests: dict[str, trend.LeakTest]) -> dict:
    """The verdict over all counters: the p-value is the least one times their number (Bonferroni)."""
    tried = {name: test for name, test in tests.items() if test.p_value is not None}
    if not tried:
        return {"verdict": trend.TOO_FEW, "p_value": None, "counter": None, "bytes_per_call": None, "level": trend.LEVEL}
    order = [trend.LEAK, trend.GARBAGE, trend.SLOWING_DOWN, trend.NONE]

    def significant(test):
        return test.verdict != trend.NONE and test.p_value * len(tried) < trend.LEVEL

    def rank(name):
        test = tried[name]
        return (order.index(test.verdict if significant(test) else trend.NONE), test.p_value)

    name = min(tried, key=rank)
    test = tried[name]
    return {
        "verdict": test.verdict if significant(test) else trend.NONE,
        "p_value": min(1.0, test.p_value * len(tried)),
        "counter": name,
        "bytes_per_call": test.bytes_per_call[-1],
        "level": trend.LEVEL,
    }


def _arena_figures(block: Block, arenas: list[Arena]) -> dict[str, dict]:
    """What the arenas of onnxruntime had in use while the calls of a block ran."""
    intervals = list(zip(block.starts.pairs()[1], block.ends.pairs()[1], strict=True))
    result = {}
    for arena in arenas:
        calls = [found for found in (arena.during(*interval) for interval in intervals) if found]
        if not calls:
            continue
        highest = max(calls, key=lambda call: call["peak"])
        result[arena.name] = {
            "before_bytes": calls[0]["before"],
            "after_bytes": calls[-1]["after"],
            "left_bytes": calls[-1]["after"] - calls[0]["before"],
            "peak_bytes": highest["peak"],
            "rise_bytes": max(call["peak"] - call["before"] for call in calls),
            "peak_is": "exact" if highest["exact_peak"] else "sampled",
            "trend": None,
            "leak": None,
        }
    return result


def _efficiency(block: Block, rises: dict[str, int]) -> dict:
    """Three ratios, each with what is divided by what. No counter counts what was not there, and each misses something, so
    the memory that a call needed is the largest rise that any of them saw."""
    counter = max(rises, key=rises.get, default=None)
    rise = rises.get(counter, 0)
    needed = f"rise of {counter}"

    def ratio(numerator: tuple[str, int | None], denominator: tuple[str, int | None]) -> dict | None:
        if not numerator[1] or not denominator[1]:
            return None
        return {
            "value": numerator[1] / denominator[1],
            "numerator": {"what": numerator[0], "value": numerator[1]},
            "denominator": {"what": denominator[0], "value": denominator[1]},
        }

    return {
        "bytes_per_token": ratio((needed, rise), ("tokens", block.tokens)),
        "overhead": ratio((needed, rise), ("minimum_bytes", block.minimum_bytes)),
        "compression_ratio": ratio(("reference_bytes", block.reference_bytes), (needed, rise)),
    }
