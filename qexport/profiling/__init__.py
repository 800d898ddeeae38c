"""profile: how fast and how large are the converted model and its classical baseline, on this machine?

Both models run in one process, in turn and in changing order, so that drift of the machine meets both alike. Times per node
come from separate sessions, because tracing slows a run down; memory comes from one child process per model and size.
docs/json_schema.md explains every figure of the report.
"""

import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qexport import installed, runtime
from qexport.arguments import whole, wholes
from qexport.bundle import Bundle
from qexport.documents import make_document
from qexport.errors import QexportError
from qexport.generated import dimension_sizes, generate, symbols
from qexport.profiling.calls import make_call, shared_buffers
from qexport.profiling.model_memory import model_memory, needed
from qexport.profiling.timing import interleaved, ratio, throughput
from qexport.profiling.trace import arena_peak, node_table, op_table, placement, read_trace
from qexport.progress import listener
from qexport.providers import full_names, provider_name, recorded

CLASSICAL, CONVERTED = "classical", "converted"
TRACED_RUNS = 10


@dataclass
class ProfileReport:
    """What `profile` measured. The attributes are the keys of its JSON, which docs/json_schema.md describes.

    Attributes:
        bundle: its folder.
        settings: the arguments that it was measured with.
        machine: operating system, processor and number of CPUs.
        sizes: one dict per batch size and length: latencies in milliseconds, per op, and memory in bytes, of both models.
        versions: of qexport and what it ran on.
        target: the URL of the machine, None for this one.
        model_sha256: of the converted model and its weights.
    """

    bundle: str
    settings: dict
    machine: dict
    sizes: list[dict]
    versions: dict
    target: str | None = None
    model_sha256: str | None = None

    def to_dict(self) -> dict:
        """The report as plain data."""
        return make_document("profile", self.__dict__)


def profile(
    bundle,
    *,
    providers=None,
    batch=(1,),
    seq=(128,),
    runs: int = 50,
    warmup: int = 5,
    threads: int | None = None,
    library=True,
    allow_fallback=False,
    memory: bool = False,
    target=None,
    progress=None,
) -> ProfileReport:
    """Measure latency, throughput, time per op, placement and memory of a bundle's two models.

    Args:
        bundle: a folder, or a `Bundle`.
        providers, allow_fallback: where it runs, as in `qexport.session`; the CPU when None.
        batch, seq: batch sizes and sequence lengths; every pair is measured. A number is a list of one. Lengths collapse to
            one size where the model's inputs have no such dimension.
        runs, warmup: timed runs of each model and size, and runs before them.
        threads: intra-op threads; the runtime's choice when None.
        library: as in `qexport.session`, for the converted model.
        memory: run a `qexport.memory.AdvancedMemoryProfiler` over loading and running each model, some ten seconds longer.
        target: measure on another machine: ssh://user@host[:port], or a `qexport.remote.Target`. `library` may then also be
            a wheel of qexport for that machine.
        progress: called with the step in words and the share that is done, 0 to 1.

    Raises:
        UsageError: a number below 1, a length above the model's limit, more threads than the machine bears, or `providers`
            as in `qexport.session`.
        QexportError: the bundle, the runtime, its providers or the target is at fault.
    """
    batches, lengths = wholes("batch", batch), wholes("seq", seq)
    whole("runs", runs), whole("warmup", warmup, 0)
    if threads is not None:
        whole("threads", threads)
    say = listener(progress)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if target is not None:
        from qexport.remote.measuring import measure_there

        arguments = {"providers": full_names(providers), "batch": batches, "seq": lengths, "runs": runs, "warmup": warmup}
        arguments |= {"threads": threads, "allow_fallback": allow_fallback, "memory": memory}
        return measure_there(ProfileReport, "profile", opened, target, arguments, library=library, progress=progress)
    providers = runtime.check_providers(providers)
    sizes = _distinct_sizes(opened, batches, lengths)
    feeds = [generate(opened, batch=b, seq=s).feeds[0] for b, s, _ in sizes]
    library_path = (installed.get_library_path() if library is True else str(library)) if library else None
    models = {CLASSICAL: (opened.classical_path, None), CONVERTED: (opened.model_path, library_path)}

    sessions = {
        which: runtime.session(
            path, library=lib, providers=providers, options=runtime.quiet_options(threads), allow_fallback=allow_fallback
        )
        for which, (path, lib) in models.items()
    }
    feeds = [_summarised(opened, sessions[CONVERTED], feed) for feed in feeds]
    shared, times, least = shared_buffers(opened.manifest), [], []
    for i, ((b, s, _), feed) in enumerate(zip(sizes, feeds, strict=True)):
        say(f"timing batch {b}, length {s}", 0.5 * i / len(sizes))
        calls = {which: make_call(session, feed, shared) for which, session in sessions.items()}
        times.append(interleaved(calls, runs, warmup=warmup))
        if memory:
            least.append({which: _least(models[which][0], session, feed, shared) for which, session in sessions.items()})
    del sessions, calls
    entries = []
    for i, ((b, s, dims), feed, ms) in enumerate(zip(sizes, feeds, times, strict=True)):
        entry = {"batch": b, "sequence": s, "dims": dims, "models": {}, "ratio": ratio(ms[CONVERTED], ms[CLASSICAL])}
        for j, (which, (path, lib)) in enumerate(models.items()):
            say(f"tracing the {which} model, batch {b}, length {s}", 0.5 + 0.5 * (i + j / len(models)) / len(sizes))
            tokens, classical = _tokens(opened, feed), entry["models"].get(CLASSICAL)
            figures = _figures(tokens, least[i][which], classical and classical["memory"]) if memory else None
            entry["models"][which] = {
                **throughput(ms[which], b, tokens),
                "memory": model_memory(path, lib, providers, threads, feed, shared, figures),
                **_traced(path, lib, providers, threads, feed, shared, min(runs, TRACED_RUNS)),
            }
        entries.append(entry)
    settings = recorded(providers, allow_fallback)
    settings |= {"runs": runs, "warmup": warmup, "threads": threads, "library": bool(library)}
    return ProfileReport(str(opened.path), settings, machine(), entries, versions(), model_sha256=opened.model_sha256)


def _least(path, session, feed: dict, shared) -> dict[str, int | None]:
    """The least bytes that any program must hold for the model: its weights (their files), inputs and outputs; and for one
    more run: its outputs. Of a pair in `shared` only the input counts, since both lie in the same memory."""
    from qexport.external_data import file_bytes  # needs onnx, which the rest of a profile does not

    outputs = dict(zip([o.name for o in session.get_outputs()], runtime.run(session, None, feed), strict=True))
    made = sum(array.nbytes for name, array in outputs.items() if name not in {present for _, present in shared})
    return {"model": file_bytes(path) + sum(array.nbytes for array in feed.values()) + made, "run": made or None}


def _figures(tokens: int | None, least: dict[str, int], classical: dict | None) -> dict[str, dict]:
    """What the memory profiler is told of a model; the converted one is compared with what the classical one needed."""
    return {
        name: {
            "tokens": tokens,
            "minimum_bytes": least[name],
            "reference_bytes": classical and needed(classical, *path),
        }
        for name, path in (("model", ("model",)), ("run", ("model", "run")))
    }


def _distinct_sizes(bundle: Bundle, batches, lengths) -> list[tuple[int, int | None, dict]]:
    """(batch, length, sizes of the symbolic dimensions) of every pair that differs, as it runs: the model's own batch where
    that is fixed; the length is None for fixed inputs."""
    sizes, seen = [], []
    kinds = symbols(bundle.manifest).values()
    fixed = None if any(kinds) else next((spec["shape"][0] for spec in bundle.manifest["inputs"] if spec["shape"]), 1)
    for b in batches:
        for s in lengths:
            dims = dimension_sizes(bundle.manifest, b, s)
            if dims in seen:
                continue
            seen.append(dims)
            sizes.append((b if fixed is None else fixed, None if all(kinds) else s, dims))
    return sizes


def _summarised(bundle: Bundle, session, feed: dict) -> dict:
    """The feed with summaries of its caches, as a step behind others finds them: those that a run leaves behind."""
    pairs = (bundle.manifest.get("kv_cache") or {}).get("summaries", [])
    if not pairs:
        return feed
    made = runtime.run(session, [present for _, present in pairs], feed)
    return feed | {past: array for (past, _), array in zip(pairs, made, strict=True)}


def _tokens(bundle: Bundle, feed: dict) -> int | None:
    """Number of tokens of a feed; None for models without token ids."""
    counts = [feed[spec["name"]].size for spec in bundle.manifest["inputs"] if spec["kind"] == "token_ids"]
    return sum(counts) or None


def _traced(path, library, providers, threads, feed, shared, runs: int) -> dict:
    """Times, placement and memory by node, from `runs` traced runs after one to warm up.

    Memory patterns are off: with them the runtime takes one block for all nodes, and no node shows its own.
    """
    with tempfile.TemporaryDirectory(prefix="qexport-") as folder:
        options = runtime.quiet_options(threads)
        options.enable_profiling = True
        options.enable_mem_pattern = False
        options.profile_file_prefix = str(Path(folder) / "trace")
        # what may fall back to the CPU was settled when the timed sessions were opened
        session = runtime.session(path, library=library, providers=providers, options=options, allow_fallback=True)
        call = make_call(session, feed, shared)
        for _ in range(runs + 1):
            call()
        events = read_trace(session.end_profiling())
    if len(events) != runs + 1:
        raise QexportError(f"{path}: the trace holds {len(events)} runs instead of {runs + 1}; lower the number of runs")
    nodes = node_table(events[1:], events[0])
    names = [provider_name(p) for p in providers]
    return {
        "ops": op_table(nodes),
        "placement": placement(nodes, names),
        "arena_peak_bytes": arena_peak(events),
        "nodes": nodes,
    }


def machine() -> dict:
    """Where a report was measured."""
    return {"platform": platform.platform(), "processor": _processor(), "cpu_count": os.cpu_count()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict:
    """The versions of what a report measured."""
    from qexport import __version__

    return {"qexport": __version__, "onnxruntime": installed.onnxruntime().__version__, "python": platform.python_version()}
