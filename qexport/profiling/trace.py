"""onnxruntime's own profiling trace: time, provider and memory of every node, per timed run."""

import json
from collections import defaultdict
from pathlib import Path

from qexport.errors import QexportError

KERNEL = "_kernel_time"
MEMCPY = ("MemcpyFromHost", "MemcpyToHost")


def read_trace(path) -> list[list[dict]]:
    """The node events of a trace, one list per `session.run`, in the order of the runs. An event's times are microseconds.

    Raises:
        QexportError: the file is missing or no trace.
    """
    try:
        events = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QexportError(
            f"{path}: onnxruntime's profiling trace cannot be read: {' '.join(str(error).split())}"
        ) from error
    runs = sorted((e["ts"], e["ts"] + e["dur"], i) for i, e in enumerate(_named(events, "model_run")))
    nodes = sorted((e for e in events if e.get("cat") == "Node" and e["name"].endswith(KERNEL)), key=lambda e: e["ts"])
    result, position = [], 0
    for start, end, _ in runs:
        own = []
        while position < len(nodes) and nodes[position]["ts"] <= end:
            if nodes[position]["ts"] >= start:
                own.append(nodes[position])
            position += 1
        result.append(own)
    return result


def _named(events, name):
    return [e for e in events if e.get("cat") == "Session" and e.get("name") == name]


def node_table(runs: list[list[dict]], first: list[dict] = ()) -> list[dict]:
    """One entry per node, the slowest first: name, op, provider, calls per run, microseconds per run (mean), share of all
    node time, output bytes, and the memory figures that the runtime gives (None where it gives none).

    Args:
        runs: node events of the timed runs.
        first: node events of the session's very first run, in which its memory peak builds up.
    """
    if not runs:
        return []
    raised = peak_raises(first)
    # the allocator's peak never falls, so the last event of a node has it
    peaks = {_key(event): _largest([event], "mem_in_use_peak") for event in first}
    grouped = defaultdict(list)
    for run in runs:
        for event in run:
            args = event["args"]
            grouped[event["name"].removesuffix(KERNEL), args.get("op_name", ""), args.get("node_index", "")].append(event)
    total = sum(event["dur"] for run in runs for event in run) or 1
    table = []
    for (name, op, index), events in grouped.items():
        spent = sum(e["dur"] for e in events)
        table.append(
            {
                "name": name,
                "op": op,
                "provider": events[0]["args"].get("provider") or "unknown",
                "calls": round(len(events) / len(runs), 3),
                "time_us": spent / len(runs),
                "share": spent / total,
                "output_bytes": _largest(events, "output_size"),
                "memory_in_use_bytes": _largest(events, "mem_bytes_in_use"),
                "memory_delta_bytes": _largest(events, "mem_in_use_delta"),
                "memory_peak_raised_bytes": raised.get((name, index)),
                "memory_peak_bytes": peaks.get((name, index)),
            }
        )
    return sorted(table, key=lambda row: -row["time_us"])


def peak_raises(first: list[dict]) -> dict[tuple[str, str], int]:
    """By how many bytes each node (name, index) raised the peak of its device's allocator in the session's first run.

    Scratch memory that is gone when the node ends shows here and nowhere else. Empty where the runtime tells nothing.
    """
    raises, peaks = defaultdict(int), {}
    for event in first:
        args = event["args"]
        if args.get("mem_in_use_peak") in (None, ""):
            continue
        provider, peak = args.get("provider"), int(args["mem_in_use_peak"])
        # before the first node, what the session holds after loading is in use
        before = peaks.get(provider, int(args.get("mem_bytes_in_use", peak)) - int(args.get("mem_in_use_delta", 0)))
        raises[_key(event)] += max(peak - before, 0)
        peaks[provider] = max(peak, before)
    return dict(raises)


def _key(event: dict) -> tuple[str, str]:
    return event["name"].removesuffix(KERNEL), event["args"].get("node_index", "")


def arena_peak(runs: list[list[dict]]) -> int | None:
    """The most bytes that the runtime's allocator had in use, None where the runtime does not tell."""
    return _largest([event for run in runs for event in run], "mem_in_use_peak")


def _largest(events, key) -> int | None:
    values = [int(e["args"][key]) for e in events if e["args"].get(key) not in (None, "")]
    return max(values) if values else None


def op_table(nodes: list[dict]) -> list[dict]:
    """The node table summed by op type and provider, the slowest first."""
    grouped = defaultdict(list)
    for node in nodes:
        grouped[node["op"], node["provider"]].append(node)
    rows = [
        {
            "op": op,
            "provider": provider,
            "nodes": len(group),
            "time_us": sum(node["time_us"] for node in group),
            "share": sum(node["share"] for node in group),
        }
        for (op, provider), group in grouped.items()
    ]
    return sorted(rows, key=lambda row: -row["time_us"])


def placement(nodes: list[dict], asked: list[str]) -> dict:
    """Where the nodes ran: nodes by provider, copies between devices, and the nodes that ran on another provider than the
    first one asked for."""
    providers = defaultdict(int)
    for node in nodes:
        providers[node["provider"]] += 1
    copies = sum(node["op"] in MEMCPY for node in nodes)
    elsewhere = [node["name"] for node in nodes if node["provider"] != asked[0] and node["op"] not in MEMCPY]
    return {"asked": asked, "nodes": dict(providers), "memcpy_nodes": copies, "not_on_first_provider": elsewhere}
