"""The figures of each kind of document, with the noise that the document states for them, and what must agree."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qexport.providers import asked_for
from qexport.words import plural, site_label

ERRORS, TIMES, SIZES, VERDICTS = "errors", "times", "sizes", "verdicts"
# Relative errors that are no more than float32's rounding, and bytes that allocators and the system's counters are off by.
ROUNDING, MEMORY = 1e-5, 2**20


@dataclass(frozen=True)
class Figure:
    """A number of a document.

    Attributes:
        value: None where it is not finite.
        kind: errors, times, sizes or verdicts.
        unit: share, ms, bytes, ratio, level, or count.
        interval: where it lies by the document's own noise; None where the document states none.
        floor: changes up to here are rounding.
        judged: whether a change is good or bad.
        control: a figure that measures the machine; where it changed, this one says nothing.
    """

    value: float | None
    kind: str
    unit: str
    interval: list | None = None
    floor: float = 0.0
    lower_is_better: bool = True
    judged: bool = True
    control: str | None = None


@dataclass
class Part:
    """A document: its figures by name; `identity`, what must be equal to compare it at all; and `terms`, by kind, what must
    be equal to judge figures of that kind."""

    identity: dict
    figures: dict[str, Figure] = field(default_factory=dict)
    terms: dict = field(default_factory=dict)

    def add(self, name: str, value, kind: str, unit: str, interval=None, **options) -> None:
        """Add a figure. TypeError where it is no number, and is in the document for something else."""
        if not isinstance(value, (int, float, type(None))):
            raise TypeError(f"{name} is {type(value).__name__}")
        self.figures[name] = Figure(value, kind, unit, list(interval) if interval else None, **options)

    def error(self, name: str, metrics: dict | None, floor: float = ROUNDING) -> None:
        """Add an error of validate: a *metrics* object, or None where it was not measured."""
        if metrics:
            self.add(name, metrics["relative_error"], ERRORS, "share", metrics["relative_error_ci95"], floor=floor)

    def ratio(self, name: str, found: dict) -> None:
        """Add a ratio of times of profile: the median of the rounds in its interval or, of few rounds, in the quartiles."""
        rounds = found["of_rounds"]
        self.add(name, rounds["p50"], TIMES, "ratio", found["median_ci95"] or (rounds["p25"], rounds["p75"]))

    def verdict(self, passed: bool) -> None:
        """Add whether the document's own check passed."""
        self.add("passed", float(passed), VERDICTS, "verdict", lower_is_better=False)


def _data(document: dict) -> dict:
    """Terms of what depends on the inputs: which they were, wherever their file lay, and the providers that ran on them."""
    data = document["data"]
    count = f", {plural(data['samples'] if 'samples' in data else data['judged'], 'item')}"
    return dict.fromkeys((ERRORS, VERDICTS), Path(data["source"]).name + f"{count}, {_providers(document)}")


def _providers(document: dict) -> str:
    return ", ".join(asked_for(document.get("settings", {})))


def _machine(document: dict) -> str:
    settings, machine = document["settings"], document["machine"]
    threads = settings["threads"] or "all"
    return f"{machine['processor']} with {machine['cpu_count']} CPUs, {threads} threads, {_providers(document)}"


def _sites(document: dict) -> list[str]:
    return [site_label(site) for site in document["sites"]]


def _validate(document: dict) -> Part:
    outputs = document["outputs"]
    part = Part({"outputs": sorted(outputs["fallback"]), "attentions": _sites(document)}, terms=_data(document))
    floor = document["max_error"]["sites"] or ROUNDING  # that of the outputs allows compressed weights their loss as well
    part.verdict(document["passed"])
    for mode, words in (("library", ""), ("fallback", ", without the library")):
        for name, metrics in outputs.get(mode, {}).items():
            part.error(f"error of output {name}{words}", metrics, floor)
    for site in document["sites"]:
        for mode, words in (("local", "by itself"), ("propagated", "in the model")):
            part.error(f"error of {site_label(site)} {words}", site[mode], floor)
    return part


def _profile(document: dict) -> Part:
    machine, version = _machine(document), document["versions"]["onnxruntime"]
    # one runtime optimises one model to the same nodes on one machine
    nodes = {op["op"]: op["nodes"] for op in document["sizes"][0]["models"]["classical"]["ops"]}
    # the memory of the process is that of the model on the CPU alone
    terms = {TIMES: machine, SIZES: _providers(document)}
    part = Part({f"nodes of the classical model ({version}, {machine})": nodes}, terms=terms)
    for size in document["sizes"]:
        where = f"batch {size['batch']}" + (f", length {size['sequence']}" if size["sequence"] else "")
        part.ratio(f"time ratio, {where}", size["ratio"])
        for which, model in size["models"].items():
            ours, times = which == "converted", model["latency_ms"]
            part.add(
                f"time of the {which} model, {where}",
                times["p50"],
                TIMES,
                "ms",
                (times["p50"], times["p90"]),
                judged=ours,
                control=f"time of the classical model, {where}" if ours else None,
            )
            memory = {"peak memory": (model["memory"] or {}).get("peak_bytes"), "arena": model["arena_peak_bytes"]}
            for name, count in memory.items():
                if count is not None:
                    part.add(f"{name} of the {which} model, {where}", count, SIZES, "bytes", floor=MEMORY, judged=ours)
    return part


def _scaling(document: dict) -> Part:
    settings = document["settings"]
    terms = {TIMES: _machine(document)} | dict.fromkeys((ERRORS, SIZES), _providers(document))
    part = Part({key: settings[key] for key in ("heads", "head_size", "causal")}, terms=terms)
    part.identity["inputs"] = Path(settings["inputs"]).name
    for contender in document["contenders"]:
        ours = contender["provider"] == "qexport"
        for row in contender["lengths"]:
            where = f"{contender['name']}, length {row['n']}"
            part.add(f"time of {where}", row["ms"], TIMES, "ms", (row["ms_p25"], row["ms_p75"]), judged=ours)
            part.add(f"error of {where}", row["error_mean"], ERRORS, "share", floor=ROUNDING, judged=ours)
            if row["memory_bytes"] is not None:
                part.add(f"memory of {where}", row["memory_bytes"], SIZES, "bytes", floor=MEMORY, judged=ours)
    return part


def _tune(document: dict) -> Part:
    part, best = Part({"attentions": _sites(document)}, terms=_data(document)), document["best"]
    part.terms[TIMES] = _providers(document)
    part.verdict(document["passed"])
    part.add("error of the best recipe", best["error"], ERRORS, "share", best["error_ci95"], floor=ROUNDING)
    if best["ratio"]:
        part.ratio("time ratio of the best recipe", best["ratio"])
    return part


def _compress(document: dict) -> Part:
    metric = document["metric"]
    part = Part(
        {"weights": sorted(layer["name"] for layer in document["layers"]), "metric": (metric["name"], metric["output"])},
        terms=_data(document),
    )
    part.verdict(document["passed"])
    part.add("size of the model's file", document["size"]["after"], SIZES, "bytes")
    part.add(f"loss of {metric['name']}", metric["loss"], ERRORS, "share", floor=ROUNDING)
    for name, found in document["outputs"].items():
        part.add(f"error of output {name}", found["relative_error"], ERRORS, "share", floor=ROUNDING)
    return part


def _resilience(document: dict) -> Part:
    metric, settings = document["metric"], document["settings"]
    same = {"metric": (metric["name"], metric["output"]), "attentions": document["sites"], "noise": settings["noise"]}
    part = Part(same, terms=_data(document))
    for cell in document["cells"]:
        where = f"{cell['mitigation']}, {cell['shots']} shots, level {cell['level']:g}"
        for key, words in (("loss", "loss"), ("output_error", "output error")):
            part.add(f"{words} of {where}", cell[key]["mean"], ERRORS, "share", cell[key]["ci95"], floor=ROUNDING)
    for found in document["thresholds"]:
        where = f"{found['mitigation']}, {found['shots']} shots, loss {100 * settings['tolerance']:g} %"
        if found["level"] is not None:
            interval = found["level_ci95"]
            part.add(f"threshold of {where}", found["level"], ERRORS, "level", interval, lower_is_better=False)
    return part


def _inspect(document: dict) -> Part:
    ends = {key: [value["name"] for value in document[key]] for key in ("inputs", "outputs")}
    part = Part(ends)
    part.add("size of the model's file", document["file_bytes"], SIZES, "bytes")
    part.add("bytes of the weights", document["parameter_bytes"], SIZES, "bytes")
    part.add("nodes", document["nodes"], SIZES, "count", judged=False)
    return part


# Schema without "qexport." -> what its document holds.
FIGURES: dict[str, Callable[[dict], Part]] = {
    "validate": _validate,
    "profile": _profile,
    "scaling": _scaling,
    "tune": _tune,
    "compress": _compress,
    "resilience": _resilience,
    "inspect": _inspect,
}
