"""tune: the fastest recipe that holds a tolerance, on this machine and on the user's own inputs.

1. One probe measures what every setting errs and takes at every site (`measurement`).
2. A few runs with one site at a time tell how far its error carries to the outputs (its gain).
3. Squared errors and times add up, so a knapsack gives each site its setting (`allocation`): the whole front at once.
4. The best few are tried in the model itself; what they really err scales the allocation, and the last are timed together.
"""

import math
import time as clock
from dataclasses import dataclass, field
from pathlib import Path

from qexport import installed, runtime
from qexport._swap import check_file
from qexport.arguments import as_path, real, whole
from qexport.bundle import Bundle
from qexport.bundle_writer import check_output
from qexport.data import load_inputs
from qexport.documents import make_document
from qexport.errors import QexportError, UsageError
from qexport.external_data import load_structure
from qexport.feeds import Inputs
from qexport.manifest import package_version
from qexport.progress import listener
from qexport.providers import option_words, recorded
from qexport.tuning.measurement import SiteTable, key_counts, measure
from qexport.tuning.output import OTHER_FILES, SUFFIXES, recipe_of, write
from qexport.tuning.search import Search
from qexport.tuning.settings import grid
from qexport.tuning.trials import Bench, Candidate
from qexport.validation.probes import beside, ordered_sites

# More batches than this tell little more about a recipe, and every trial runs them all.
MOST_FEEDS = 8
SAME_SPEED = 0.01


@dataclass
class TuningReport:
    """What `tune` found. The attributes are the keys of its JSON, which docs/json_schema.md describes; the chief ones:

    Attributes:
        passed: some recipe holds the tolerance.
        recipe: the fastest that does; the most accurate one where none does.
        best: what was measured of `recipe`.
        candidates: all recipes that were tried, with their errors and latencies in milliseconds.
        seconds: how long it took.
        settings: the providers, seeds and threads.
    """

    bundle: str
    passed: bool
    reasons: list[str]
    notes: list[str]
    data: dict
    max_error: float
    recipe: dict
    best: dict
    candidates: list[dict]
    sites: list[dict]
    trials: int
    seconds: float
    output: str | None = None
    settings: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The report as plain data; figures that are not finite are None."""
        return make_document("tune", self.__dict__)


def tune(
    bundle,
    data=None,
    *,
    max_error: float,
    output=None,
    batch: int | None = None,
    seq: int | None = None,
    trials: int = 20,
    time: float | None = None,
    seeds: int = 3,
    threads: int | None = None,
    providers=None,
    allow_fallback=False,
    progress=None,
) -> TuningReport:
    """Find the recipe with the least latency whose outputs differ from the classical model's by `max_error` at most.

    Args:
        bundle: a folder, or a `Bundle`.
        data, batch, seq: inputs, as for `qexport.validate`; the longest batch is the one that is timed.
        max_error: largest relative Frobenius error of any output, mean over the seeds.
        output: a folder that a bundle with the recipe is written to, not that of `bundle`, or a .yaml file for the recipe;
            nothing is written when None, or when no recipe holds `max_error`.
        trials: recipes that may be tried in the whole model.
        time: seconds after which no further trial begins; None for no limit.
        seeds: runs of each recipe that another seed changes.
        threads: intra-op threads; the runtime's choice when None.
        providers, allow_fallback: where everything runs and is timed, as in `qexport.session`; the CPU when None.
        progress: called with the step in words and the share that is done, 0 to 1.

    Raises:
        UsageError: a wrong argument, or `providers` as in `qexport.session`.
        QexportError: the bundle, the data, the op library, the runtime or its providers are at fault.
    """
    _check(max_error, trials, time, seeds, threads)
    started = clock.monotonic()
    say = listener(progress)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if output is not None:
        _check_output(as_path("output", output), opened)
    where = {"providers": providers, "allow_fallback": allow_fallback}
    installed.get_library_path()
    runtime.check_start(**where)
    check_measurable(opened)
    inputs, notes = _inputs(opened, data, batch, seq)
    timed = max(inputs.feeds, key=lambda feed: sum(array.size for array in feed.values()))
    sites = watched_sites(opened)

    say("counting keys", 0.0)
    keys = key_counts(opened, sites, timed, providers)
    settings = [grid(count, max_error) for count in keys]
    words = f"measuring {sum(map(len, settings))} settings of {len(sites)} attentions"
    say(words, 0.02)
    tables = measure(opened, inputs, timed, sites, settings, threads, lambda done: say(words, 0.02 + 0.39 * done), where)
    search = Search(Bench(opened, sites, inputs, timed, seeds, threads, where), tables, max_error, trials, say)
    search.deadline = started + time if time is not None else math.inf
    candidates = search.run()

    within = search.finalists
    best = _best(within) if within else min(candidates, key=lambda c: c.error)
    recipe = recipe_of(opened, sites, best.settings)
    reasons = [] if within else [_unreachable(max_error, best)]
    seconds = clock.monotonic() - started
    if output is not None and within:
        say("writing", 0.99)
        words = " ".join(["qexport tune", str(opened.path), f"--max-error {max_error:g}", *option_words(recorded(**where))])
        remark = f"{words}: error {best.error:.2g}, {best.latency_ms:.3g} ms"
        write(output, opened, sites, best.settings, recipe, remark)
    return TuningReport(
        bundle=str(opened.path),
        passed=bool(within),
        reasons=reasons,
        notes=notes + search.notes,
        data={"source": inputs.source, "samples": inputs.samples, "batches": len(inputs.feeds), "notes": inputs.notes},
        max_error=max_error,
        recipe=recipe,
        best=_entry(best, max_error, candidates, recipe),
        candidates=[_entry(c, max_error, candidates, recipe_of(opened, sites, c.settings)) for c in candidates],
        sites=[
            site_entry(t, count) | {"setting": s.named()} for t, count, s in zip(tables, keys, best.settings, strict=True)
        ],
        trials=len(candidates),
        seconds=seconds,
        output=str(output) if output is not None and within else None,
        settings=recorded(**where) | {"seeds": seeds, "threads": threads},
        versions={"qexport": package_version("qexport"), "onnxruntime": installed.onnxruntime().__version__},
    )


def _check(max_error, trials, time, seeds, threads) -> None:
    if not 0 < real("max_error", max_error) < 1:
        raise UsageError(f"max_error must be between 0 and 1, such as 0.01 for 1 %, got {max_error}")
    for name, value in (("trials", trials), ("seeds", seeds)):
        whole(name, value)
    runtime.check_threads(threads)
    if time is not None and not real("time", time) > 0:
        raise UsageError(f"time must be > 0 seconds, got {time}")


def _check_output(output: Path, bundle: Bundle) -> None:
    """Find out before anything is measured whether the recipe or the bundle can be written."""
    suffix = output.suffix.lower()
    if suffix in OTHER_FILES:
        mend = f"name it {output.with_suffix(SUFFIXES[0])}, or a folder"
        raise UsageError(f"{output}: a recipe goes to a .yaml file, a bundle to a folder, and {suffix} is neither; {mend}")
    if suffix not in SUFFIXES:
        check_output(output, source=bundle.path)
    else:
        check_file(output)


def check_measurable(bundle: Bundle) -> None:
    """Whether the attentions of a bundle can be measured under other settings.

    Raises:
        QexportError: its steps read summaries of a cache, or it is noisy.
    """
    if (bundle.manifest.get("kv_cache") or {}).get("summaries"):
        raise QexportError(
            f"{bundle.path}: its steps read summaries of the cache, which cannot be measured under other settings; convert "
            "with another recipe, such as --strategy exact, and use that"
        )
    if bundle.manifest.get("noise"):
        raise QexportError(f"{bundle.path}: its attention is noisy, which no recipe mends; convert it without noise")


def _inputs(bundle: Bundle, data, batch, seq) -> tuple[Inputs, list[str]]:
    """The inputs, of which the first batches are enough, and what to say about them."""
    inputs, notes = load_inputs(bundle, data, batch=batch, seq=seq), []
    if len(inputs.feeds) > MOST_FEEDS:
        total = inputs.samples
        inputs = Inputs(inputs.feeds[:MOST_FEEDS], inputs.source, inputs.notes)
        notes.append(f"tuned on the first {inputs.samples} of {total} items; 'qexport validate --data' checks them all")
    if data is None:
        notes.append(f"tuned on {inputs.source}: errors and times depend on the inputs, give --data with those that matter")
    return inputs, notes


def watched_sites(bundle: Bundle) -> list[dict]:
    """The sites that can be watched, in the order of the graph; `causal`: whether each is."""
    model = load_structure(bundle.model_path)
    sites = ordered_sites(model, ordered_sites(load_structure(bundle.classical_path), bundle.manifest["sites"]))
    _, local, _ = beside(bundle.classical_path, model, sites)
    causal = {node.output[0] for node in model.graph.node if any(a.name == "is_causal" and a.i for a in node.attribute)}
    sites = [site | {"causal": site["output"] in causal} for site in sites if site["name"] in local and site["q_heads"]]
    if not sites:
        raise QexportError(f"{bundle.path}: no attention whose values are in both models, so none can be tuned")
    return sites


def _speed(candidate: Candidate) -> float:
    """Its time over the classical model's, round by round: a slow spell of the machine hits both."""
    return candidate.ratio["of_rounds"]["p50"]


def _best(candidates: list[Candidate]) -> Candidate:
    """The fastest; of those that are as fast, to what timing can tell, the most accurate."""
    fastest = min(map(_speed, candidates))
    return min((c for c in candidates if _speed(c) <= (1 + SAME_SPEED) * fastest), key=lambda c: c.error)


def _unreachable(max_error: float, best: Candidate) -> str:
    return f"no recipe holds {max_error:g}: the best that was found errs by {best.error:.2g} at output {best.output!r}"


def _entry(candidate: Candidate, max_error: float, candidates: list[Candidate], recipe: dict) -> dict:
    beaten = candidate.ratio is None or any(
        other.ratio and _speed(other) <= _speed(candidate) and other.error <= candidate.error and other is not candidate
        for other in candidates
    )
    return {
        "label": candidate.label,
        "within": bool(candidate.error <= max_error),
        "on_front": not beaten,
        "error": candidate.error,
        "error_ci95": list(candidate.error_ci95) if candidate.error_ci95 else None,
        "output": candidate.output,
        "predicted_error": candidate.predicted_error,
        "latency_ms": candidate.latency_ms,
        "ratio": candidate.ratio,
        "recipe": recipe,
    }


def site_entry(table: SiteTable, keys: int) -> dict:
    """A site: its keys, and all settings that it was measured with."""
    return {
        **{key: table.site[key] for key in ("name", "layer", "module")},
        "keys": keys,
        "measured": [
            {"setting": s.named(), "relative_error": float(error), "time_us": float(time) * 1e6}
            for s, error, time in zip(table.settings, table.relative_errors(), table.times, strict=True)
        ],
    }
