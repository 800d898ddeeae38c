"""onnxruntime's arenas: what its allocators had in use, from the profiling trace of a session, after the fact.

After every node the trace says how many bytes the allocator of the node's device had in use (`mem_bytes_in_use`) and the
most it ever had (`mem_in_use_peak`). onnxruntime 1.31 and 1.32 write them, 1.23 does not.
"""

import time
from bisect import bisect
from dataclasses import dataclass, field

from qexport.errors import UsageError
from qexport.memory.counters import DEVICE, HOST

SOURCE = "onnxruntime"


@dataclass
class Arena:
    """In-use bytes of one allocator at the ends of nodes.

    Attributes:
        name: onnxruntime and the provider whose nodes it serves.
        place: "host" or "device".
        loaded: bytes in use before the first node.
        nodes: (nanoseconds on the system's clock, bytes in use then, the most in use up to then) of nodes as they ended.
    """

    name: str
    place: str
    loaded: int
    nodes: list[tuple[int, int, int]] = field(default_factory=list)

    def during(self, start: int, end: int) -> dict | None:
        """{"before", "after", "peak", "exact_peak"} of the nodes that ended in start..end; None where none did. The peak is
        exact where it was the highest up to then; else it is what was in use at the end of some node."""
        first, last = (bisect(self.nodes, moment, key=lambda node: node[0]) for moment in (start, end))
        own = self.nodes[first:last]
        if not own:
            return None
        _, before, mark = self.nodes[first - 1] if first else (0, self.loaded, 0)
        highest = max(peak for _, _, peak in own)
        exact = highest > mark
        peak = highest if exact else max(in_use for _, in_use, _ in own)
        return {"before": before, "after": own[-1][1], "peak": peak, "exact_peak": exact}


class Watched:
    """A session whose trace will be read."""

    def __init__(self, session):
        if not session.get_session_options().enable_profiling:
            raise UsageError("this session writes no trace: open it with SessionOptions.enable_profiling = True")
        self.session = session
        start = session.get_profiling_start_time_ns()
        # which clock of the system that is differs between platforms: the one that is near
        clocks = (time.time_ns, time.perf_counter_ns, time.monotonic_ns)
        near = min(clocks, key=lambda clock: abs(clock() - start))
        self.start = start + time.time_ns() - near()


def read(sessions: list[Watched]) -> tuple[list[Arena], str | None]:
    """The arenas of these sessions, or the reason why there are none. Their profiling ends.

    Raises:
        QexportError: a trace cannot be read.
    """
    if not sessions:
        return [], "no session with enable_profiling was given to `watch`"
    from qexport.installed import onnxruntime
    from qexport.profiling.trace import read_trace
    from qexport.providers import CUDA

    arenas = []
    for number, watched in enumerate(sessions):
        by_provider: dict[str, Arena] = {}
        for event in (e for run in read_trace(watched.session.end_profiling()) for e in run):
            args = event["args"]
            if args.get("mem_bytes_in_use") in (None, ""):
                continue
            provider, in_use = args.get("provider") or "unknown", int(args["mem_bytes_in_use"])
            if provider not in by_provider:
                name = f"{SOURCE}{f'[{number}]' if len(sessions) > 1 else ''} {provider.removesuffix('ExecutionProvider')}"
                loaded = in_use - int(args["mem_in_use_delta"])
                by_provider[provider] = Arena(name, DEVICE if provider == CUDA else HOST, loaded)
            ended = watched.start + 1000 * (event["ts"] + event["dur"])
            by_provider[provider].nodes.append((ended, in_use, int(args["mem_in_use_peak"])))
        for arena in by_provider.values():
            arena.nodes.sort()
        arenas += by_provider.values()
    if not arenas:
        return [], f"onnxruntime {onnxruntime().__version__} writes no memory into its trace: 1.31 does"
    return arenas, None
