"""Candidates: whole recipes, tried in the converted model itself."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import onnx

from qexport import runtime
from qexport.bundle import Bundle
from qexport.external_data import load_structure
from qexport.feeds import Inputs
from qexport.ops.proto import set_attributes
from qexport.profiling import CLASSICAL
from qexport.profiling.calls import make_call, shared_buffers
from qexport.profiling.timing import interleaved, ratio
from qexport.tuning.settings import Setting
from qexport.validation.comparison import Remembered, output_errors
from qexport.validation.probes import open_probe
from qexport.validation.statistics import confidence_interval

TIMED_ROUNDS = 25
# Sessions that are open at a time: each holds the model's weights.
TIMED_AT_ONCE = 4


@dataclass
class Candidate:
    """A setting for each site, and what was found of it: the relative error of the worst output (mean over the seeds, and
    its 95 % interval), and, of those that were timed, milliseconds and the ratio to the classical model.
    `predicted_error` is what the allocation expected.
    """

    label: str
    settings: tuple[Setting, ...]
    predicted_error: float | None = None
    error: float | None = None
    error_ci95: tuple[float, float] | None = None
    output: str | None = None
    latency_ms: float | None = None
    ratio: dict | None = field(default=None)

    @property
    def seeded(self) -> bool:
        """Whether another seed gives another result: a `tree` too tries its budgets on a sample."""
        return any(setting.strategy != "exact" for setting in self.settings)


def with_settings(bundle: Bundle, sites: list[dict], settings) -> onnx.ModelProto:
    """The converted model with these settings at its sites; external data is not read."""
    model = load_structure(bundle.model_path)
    chosen = {site["output"]: setting for site, setting in zip(sites, settings, strict=True)}
    for node in model.graph.node:
        if node.output and node.output[0] in chosen:
            set_attributes(node, **chosen[node.output[0]].attributes())
    return model


class Bench:
    """The classical model, kept open, and what candidates are tried on; `where` are the arguments `providers` and
    `allow_fallback` of all sessions."""

    def __init__(
        self,
        bundle: Bundle,
        sites: list[dict],
        inputs: Inputs,
        timed: dict,
        seeds: int,
        threads: int | None,
        where: dict | None = None,
    ):
        self.bundle, self.sites, self.inputs, self.timed = bundle, sites, inputs, timed
        self.seeds, self.threads, self.where = seeds, threads, where or {}
        options = runtime.quiet_options(threads)
        self.classical = runtime.session(bundle.classical_path, library=False, options=options, **self.where)
        self.remembered = Remembered(self.classical)

    @contextmanager
    def opened(self, settings):
        """A session of the converted model with these settings."""
        model = with_settings(self.bundle, self.sites, settings)
        options = runtime.quiet_options(self.threads)
        with open_probe(model, self.bundle.model_path, library=True, options=options, **self.where) as session:
            yield session

    def try_error(self, candidate: Candidate) -> None:
        """Fill in the candidate's error; one run is enough where no seed changes anything."""
        seeds = list(range(self.seeds if candidate.seeded else 1))
        with self.opened(candidate.settings) as session:
            errors = output_errors(self.bundle, self.inputs, seeds, self.remembered, session)
        means = {name: float(found.relative_errors().mean()) for name, found in errors.items()}
        candidate.output = max(means, key=lambda name: np.nan_to_num(means[name], nan=np.inf))
        candidate.error = means[candidate.output]
        per_seed = errors[candidate.output].relative_errors()
        candidate.error_ci95 = confidence_interval(per_seed) if np.isfinite(per_seed).all() else None

    def largest_feeds(self, count: int) -> list[int]:
        """Numbers of the feeds with the most elements."""
        sizes = [sum(array.size for array in feed.values()) for feed in self.inputs.feeds]
        return sorted(range(len(sizes)), key=lambda i: -sizes[i])[:count]

    def error_of(self, settings, feeds: list[int]) -> float:
        """The error of the worst output on some feeds, one seed."""
        part = Inputs([self.inputs.feeds[i] for i in feeds], self.inputs.source)
        with self.opened(settings) as session:
            errors = output_errors(self.bundle, part, [0], self.remembered, session)
        return max(float(found.relative_errors()[0]) for found in errors.values())

    def try_time(self, candidates: list[Candidate], rounds: int = TIMED_ROUNDS) -> None:
        """Fill in the times: all take turns with the classical model, in groups that fit into memory."""
        for start in range(0, len(candidates), TIMED_AT_ONCE):
            group = candidates[start : start + TIMED_AT_ONCE]
            with ExitStack() as stack:
                sessions = {CLASSICAL: self.classical}
                sessions |= {i: stack.enter_context(self.opened(c.settings)) for i, c in enumerate(group)}
                shared = shared_buffers(self.bundle.manifest)
                calls = {which: make_call(session, self.timed, shared) for which, session in sessions.items()}
                times = interleaved(calls, rounds, warmup=3)
            for i, candidate in enumerate(group):
                candidate.latency_ms = float(np.median(times[i]))
                candidate.ratio = ratio(times[i], times[CLASSICAL])
