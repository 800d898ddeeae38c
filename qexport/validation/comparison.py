"""Runs a bundle's two models on the same inputs and accumulates their differences, end to end and site by site.

At most two sessions are open at a time, and the values of a batch are held only while it is compared: the classical model
runs again for every comparison.
"""

from dataclasses import dataclass, field

import numpy as np

from qexport import runtime
from qexport.bundle import Bundle
from qexport.errors import QexportError
from qexport.external_data import load_structure
from qexport.feeds import Inputs
from qexport.progress import listener
from qexport.validation.certificate import CertificateAccumulator, head_weights
from qexport.validation.probes import beside, open_probe, ordered_sites, watch
from qexport.validation.sensitivity import quantizes, sensitivity
from qexport.validation.statistics import ErrorAccumulator
from qexport.validation.unpadded import as_floats, by_head, keep_masks, padded_axis, rows

# Values of sites that are held at once, in bytes; sites are compared in groups that fit.
SITE_MEMORY = 512 * 2**20
# Outputs that are remembered, in bytes.
REMEMBERED = 512 * 2**20


class Remembered:
    """A session that remembers what it gave for each feed, up to REMEMBERED bytes: what is compared with it again and again
    need not wait for it."""

    def __init__(self, session):
        self.session, self.outputs, self.held = session, {}, 0
        self.get_outputs = session.get_outputs

    def run(self, names, feed) -> list[np.ndarray]:
        """As the session's; a feed is known by its identity, so that it has to live as long as this."""
        key = id(feed), *names
        if key in self.outputs:
            return self.outputs[key]
        values = self.session.run(names, feed)
        size = sum(value.nbytes for value in values)
        if self.held + size <= REMEMBERED:
            self.outputs[key], self.held = values, self.held + size
        return values


@dataclass
class Comparison:
    """Accumulated errors. `outputs[mode][name]` and `sites[mode][site name]` hold accumulators for the modes "fallback" and
    "library" (errors as they run through the model); `local[site name]` for a site fed with the classical values, and
    `certificates[site name]` the op's own estimate of that error, where it offers one.
    `dtypes` are the element types of the values; `baseline` is the stored outputs' relative deviation from the classical
    model's, None when there are none; `sensitivity` is how far rounding alone moves each graph output, None for models that
    do not quantise as they run.
    """

    outputs: dict[str, dict[str, ErrorAccumulator]] = field(default_factory=dict)
    sites: dict[str, dict[str, ErrorAccumulator]] = field(default_factory=dict)
    local: dict[str, ErrorAccumulator] = field(default_factory=dict)
    certificates: dict[str, CertificateAccumulator] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    site_order: list[dict] = field(default_factory=list)
    baseline: float | None = None
    sensitivity: dict[str, float] | None = None


def compare(
    bundle: Bundle, inputs: Inputs, seeds: list[int], *, library=True, providers=None, allow_fallback=False, progress=None
) -> Comparison:
    """Compare the converted model with the classical one on every feed.

    Args:
        seeds: the seeds that the library runs with.
        library: as in `qexport.runtime.session`; False compares the fallback only.
        providers, allow_fallback: of all sessions, as there.
        progress: called with the step in words and the share that is done, 0 to 1.

    Raises:
        QexportError: a model does not load or run.
    """
    say = listener(progress)
    result, where = Comparison(), {"providers": providers, "allow_fallback": allow_fallback}
    modes = [("fallback", False, seeds[:1], 0.0, 0.1)] + ([("library", library, seeds, 0.1, 0.3)] if library else [])
    for mode, lib, chosen, start, end in modes:
        tell = _step(say, f"running the models, {_mode_words(mode, chosen)}", start, end)
        result.outputs[mode] = _compare_outputs(bundle, inputs, chosen, lib, where, result, tell)
    _compare_sites(bundle, inputs, seeds, library, where, say, result)
    return result


def _step(say, words: str, start: float, end: float):
    """Called with the share of a step that is done, says how far the whole is."""
    return lambda done: say(words, start + (end - start) * done)


def _mode_words(mode: str, seeds: list[int]) -> str:
    return "without the library" if mode == "fallback" else f"with the library, {len(seeds)} seeds"


def seeded_feed(feed: dict, seed_input: str | None, seed: int) -> dict:
    """A feed with its seed, where the model takes one."""
    return feed if seed_input is None else {**feed, seed_input: np.array(seed, np.int64)}


def _compare_outputs(bundle, inputs, seeds, library, where, result: Comparison, tell) -> dict[str, ErrorAccumulator]:
    """The graph outputs of both model files as they are. Also the stored outputs against the classical model's.

    `where`: the arguments `providers` and `allow_fallback` of the sessions, here and below.
    """
    classical = runtime.session(bundle.classical_path, library=False, **where)
    model = runtime.session(bundle.model_path, library=library, **where)
    stored = ErrorAccumulator(1)
    accumulators = output_errors(bundle, inputs, seeds, classical, model, result.dtypes, stored, tell)
    if inputs.expected:
        result.baseline = float(stored.relative_errors()[0])
    return accumulators


def output_errors(
    bundle, inputs, seeds, classical, model, dtypes=None, stored=None, tell=lambda done: None
) -> dict[str, ErrorAccumulator]:
    """Errors of the graph outputs of the session `model` against those of the session `classical`, by output name.

    Args:
        dtypes: a dict that takes the element types of the outputs, by name.
        stored: takes the deviation of the inputs' stored outputs, where they have some.
        tell: called with the share that is done.
    """
    names = [o.name for o in classical.get_outputs()]
    symbols = {o.name: o.shape for o in classical.get_outputs()}
    accumulators = {name: ErrorAccumulator(len(seeds)) for name in names}
    for i, feed in enumerate(inputs.feeds):
        tell(i / len(inputs.feeds))
        masks = keep_masks(bundle.manifest, feed)
        base = dict(zip(names, runtime.run(classical, names, feed), strict=True))
        runs = [runtime.run(model, names, seeded_feed(feed, bundle.seed_input, seed)) for seed in seeds]
        for k, name in enumerate(names):
            if dtypes is not None:
                dtypes[name] = str(base[name].dtype)
            padded = padded_axis(base[name].shape, symbols[name], masks)
            values = [_same_shape(name, base[name], one[k]) for one in runs]
            accumulators[name].add(*as_floats(rows(base[name], padded), [rows(value, padded) for value in values]))
        if stored is not None and inputs.expected:
            _add_stored(stored, base, inputs.expected[i])
    return accumulators


def _add_stored(stored: ErrorAccumulator, ours: dict, expected: dict) -> None:
    """Where both are finite; fully masked rows may hold NaN in both."""
    for name in set(ours) & set(expected):
        if ours[name].shape == expected[name].shape:
            finite = np.isfinite(ours[name]) & np.isfinite(expected[name])
            stored.add(ours[name][finite], [expected[name][finite]])


def _same_shape(name: str, base: np.ndarray, value: np.ndarray) -> np.ndarray:
    if value.shape != base.shape:
        raise QexportError(f"{name!r} has shape {value.shape} in the converted model and {base.shape} in the classical one")
    return value


def _compare_sites(bundle, inputs, seeds, library, where, say, result: Comparison) -> None:
    sites, rounds = _order(bundle)
    result.site_order = sites
    if not sites:
        return
    if rounds:
        say("measuring how far rounding moves the outputs", 0.3)
        result.sensitivity = sensitivity(bundle, inputs, sites, where["providers"])
    tell = _step(say, "comparing the sites, without the library", 0.4, 0.5)
    result.sites["fallback"] = _watched_sites(bundle, inputs, sites, seeds[:1], False, where, result.dtypes, tell)
    if library:
        tell = _step(say, f"comparing the sites, {len(seeds)} seeds", 0.5, 0.75)
        result.sites["library"] = _watched_sites(bundle, inputs, sites, seeds, library, where, result.dtypes, tell)
        tell = _step(say, f"comparing each site alone, {len(seeds)} seeds", 0.75, 1.0)
        _compare_alone(bundle, inputs, sites, seeds, library, where, result, tell)


def _order(bundle) -> tuple[list[dict], bool]:
    """The sites in the order of the models, and whether the classical one quantises its activations. Here alone, so that
    no model stays in memory, with the weights that lie in its file."""
    structure, classical = load_structure(bundle.model_path), load_structure(bundle.classical_path)
    return ordered_sites(structure, ordered_sites(classical, bundle.manifest["sites"])), quantizes(classical)


def _watched_sites(bundle, inputs, sites, seeds, library, where, dtypes, tell) -> dict[str, ErrorAccumulator]:
    """The sites' errors as they run through the converted model."""
    accumulators = {site["name"]: ErrorAccumulator(len(seeds), site["q_heads"]) for site in sites}
    with (
        open_probe(watch(bundle.classical_path, sites), bundle.classical_path, library=False, **where) as base,
        open_probe(watch(bundle.model_path, sites), bundle.model_path, library=library, **where) as model,
    ):
        same = {site["name"]: site["output"] for site in sites}
        _run_sites(bundle, inputs, base, model, sites, same, seeds, accumulators, dtypes, tell)
    return accumulators


def _compare_alone(bundle, inputs, sites, seeds, library, where, result: Comparison, tell) -> None:
    """The sites' errors when each is fed with the classical model's values; sites that cannot be are left out."""
    hybrid, local, estimates = beside(bundle.classical_path, load_structure(bundle.model_path), sites)
    sites = [site for site in sites if site["name"] in local]
    if not sites:
        return
    result.local = {site["name"]: ErrorAccumulator(len(seeds), site["q_heads"]) for site in sites}
    result.certificates = {
        site["name"]: CertificateAccumulator(site["q_heads"]) for site in sites if site["name"] in estimates
    }
    with open_probe(hybrid, bundle.classical_path, library=library, **where) as model:
        del hybrid  # as the session has it
        certify = (estimates, result.certificates)
        _run_sites(bundle, inputs, model, model, sites, local, seeds, result.local, result.dtypes, tell, certify)


def _run_sites(bundle, inputs, base, model, sites, value_of, seeds, accumulators, dtypes, tell, certify=({}, {})) -> None:
    """Compare the sites' values of `base` with the values `value_of[site name]` of `model`, by feed and seed.

    `certify` holds the names of the error estimates by site name, and where they are added up.
    """
    estimate_of, certificates = certify
    symbols = {o.name: o.shape for o in base.get_outputs()}
    takes_seed = bundle.seed_input in {v.name for v in base.get_overridable_initializers()}
    for number, feed in enumerate(inputs.feeds):
        tell(number / len(inputs.feeds))
        masks = keep_masks(bundle.manifest, feed)
        seeded = [seeded_feed(feed, bundle.seed_input, seed) for seed in seeds]
        names = [site["output"] for site in sites]
        values = runtime.run(base, names, seeded[0] if takes_seed else feed)
        for group in _groups(values, len(seeds)):
            chosen = [sites[i] for i in group]
            certified = [site["name"] for site in chosen if site["name"] in estimate_of]
            wanted = [value_of[site["name"]] for site in chosen] + [estimate_of[name] for name in certified]
            runs = [runtime.run(model, wanted, one) for one in seeded]
            for position, (site, i) in enumerate(zip(chosen, group, strict=True)):
                value = values[i]
                dtypes[site["output"]] = str(value.dtype)
                padded = padded_axis(value.shape, symbols[site["output"]], masks)
                of_seeds = [_same_shape(site["output"], value, one[position]) for one in runs]
                _add_site(accumulators[site["name"]], site["q_heads"], padded, value, of_seeds)
                if site["name"] in certified:
                    at = len(chosen) + certified.index(site["name"])
                    weights = head_weights(value, site["q_heads"], padded)
                    certificates[site["name"]].add(weights, [one[at] for one in runs])


def _add_site(accumulator: ErrorAccumulator, heads: int, padded, value, runs) -> None:
    """A site's values as (heads, elements), so that the errors of the heads come apart without another pass."""
    base = by_head(value, heads, padded)
    accumulator.add(base, [by_head(run, heads, padded) for run in runs])


def _groups(values: list[np.ndarray], seeds: int):
    """Indices of the sites in groups whose values for all seeds, in float64, fit into SITE_MEMORY."""
    group, held = [], 0
    for i, value in enumerate(values):
        need = value.size * 8 * (seeds + 1)
        if group and held + need > SITE_MEMORY:
            yield group
            group, held = [], 0
        group.append(i)
        held += need
    if group:
        yield group
