"""validate: is the converted model the classical one, up to the sampling error that its recipe asks for?

Both models run on the same inputs; the converted one without the op library (its fallback must equal the classical model up
to rounding) and with it, once per seed. docs/json_schema.md explains every figure of the report.
"""

import math
from dataclasses import dataclass, field

from qexport.arguments import real, whole
from qexport.bundle import Bundle
from qexport.data import load_inputs
from qexport.documents import make_document
from qexport.errors import UsageError
from qexport.installed import onnxruntime
from qexport.manifest import package_version
from qexport.ops.strategies import BLOCKWISE
from qexport.providers import full_names, recorded, uses_tf32
from qexport.validation.certificate import IMPLAUSIBLE
from qexport.validation.comparison import compare
from qexport.validation.limits import limits_of, low_precision, rounding_of
from qexport.validation.statistics import BIAS_LEVEL, ESTIMATED, EXACT, SAMPLING, SYSTEMATIC


@dataclass
class ValidationReport:
    """What `validate` found. The attributes are the keys of its JSON, which docs/json_schema.md describes; the chief ones:

    Attributes:
        passed: the verdict.
        reasons: why it failed, in words; empty when it passed.
        notes: what else to know.
        outputs: name of a model output to its errors.
        sites: one dict per attention, with its errors, bias and spread.
        worst_site: the entry of `sites` with the largest error; None where no site could be measured.
        settings: the providers that it ran on.
        target: the URL of the machine it was computed on, None for this one.
        model_sha256: of the converted model and its weights.
    """

    bundle: str
    passed: bool
    reasons: list[str]
    notes: list[str]
    data: dict
    seeds: list[int]
    max_error: dict
    outputs: dict
    sites: list[dict]
    baseline_error: float | None
    sensitivity: dict | None
    first_divergent: dict | None
    first_over_tolerance: dict | None
    worst_site: dict | None
    settings: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    target: str | None = None
    model_sha256: str | None = None

    def to_dict(self) -> dict:
        """The report as plain data; figures that are not finite are None."""
        return make_document("validate", self.__dict__)


def validate(
    bundle,
    data=None,
    *,
    max_error: float | None = None,
    seeds: int = 5,
    batch: int | None = None,
    seq: int | None = None,
    library=True,
    providers=None,
    allow_fallback=False,
    target=None,
    progress=None,
) -> ValidationReport:
    """Compare a bundle's converted model with its classical one.

    Args:
        bundle: a folder, or a `Bundle`.
        data: .npz or .txt file, a dict of arrays or a list of texts; the bundle's stored samples when None.
        max_error: largest relative Frobenius error of any output, mean over the seeds; when None what the recipe allows: the
            error tolerance of `tree`, the rounding of its precision for `exact`, any for a noisy attention, else 0.05, and
            the largest of the sites';
            more for a model that quantises its activations as it runs.
        seeds: number of seeds, 0 .. seeds - 1, that the library runs with.
        batch, seq: items per run and sequence length; see `qexport.data.load_inputs`.
        library: True, a path of an op library, or False to compare the fallback alone.
        providers, allow_fallback: where both models run, as in `qexport.session`; the CPU when None.
        target: compute on another machine, as in `qexport.profile`.
        progress: called with the step in words and the share that is done, 0 to 1.

    Raises:
        UsageError: `seeds` < 1, `max_error` not positive, a wrong `batch` or `seq`, or `providers` as in `qexport.session`.
        QexportError: the bundle, the data, the runtime or its providers are at fault; one line says which and what to do.
    """
    whole("seeds", seeds)
    if max_error is not None and not 0 < real("max_error", max_error) < math.inf:
        raise UsageError(f"max_error must be a positive number, got {max_error}")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    where = {"providers": full_names(providers), "allow_fallback": allow_fallback}
    if target is not None:
        from qexport.remote.measuring import measure_there

        arguments = {"max_error": max_error, "seeds": seeds, "batch": batch, "seq": seq, **where}
        return measure_there(
            ValidationReport, "validate", opened, target, arguments, library=library, data=data, progress=progress
        )
    inputs = load_inputs(opened, data, batch=batch, seq=seq)
    chosen, tf32 = list(range(seeds)), uses_tf32(where["providers"])
    found = compare(opened, inputs, chosen, library=library, progress=progress, **where)

    level = BIAS_LEVEL / max(len(found.site_order), 1)
    low = max((low_precision(site) for site in opened.manifest["sites"]), default=0)
    outputs = {
        mode: {
            name: errors.metrics(max(rounding_of(found.dtypes[name], tf32), low if mode == "library" else 0))
            for name, errors in by_name.items()
        }
        for mode, by_name in found.outputs.items()
    }
    sites = [_site_entry(site, found, level, tf32) for site in found.site_order]
    limits = limits_of(opened, found.dtypes.values(), found.sensitivity, max_error, bool(library), tf32)
    divergent = first_divergent(sites, limits)
    reasons = _failures(outputs, limits, found.baseline)
    if found.sensitivity is not None and divergent:
        name = divergent["module"] or divergent["name"]
        reasons.append(f"site {name} is wrong by itself, whatever quantisation does to the outputs")
    report = ValidationReport(
        bundle=str(opened.path),
        passed=not reasons,
        reasons=reasons,
        notes=[],
        data={"source": inputs.source, "samples": inputs.samples, "batches": len(inputs.feeds), "notes": inputs.notes},
        seeds=chosen if library else [],
        max_error=limits,
        outputs=outputs,
        sites=sites,
        baseline_error=found.baseline,
        sensitivity=found.sensitivity,
        first_divergent=divergent,
        first_over_tolerance=_first_over(sites, limits),
        worst_site=_worst(sites),
        settings=recorded(**where),
        versions={"qexport": package_version("qexport"), "onnxruntime": onnxruntime().__version__},
        model_sha256=opened.model_sha256,
    )
    report.notes = _notes(report, opened)
    if tf32 and "float32" in found.dtypes.values():
        rounding = rounding_of("float32", tf32)
        report.notes.append(f"CUDA may make products of float32 in TF32: errors up to {rounding:g} are rounding")
    return report


def _site_entry(site: dict, found, level: float, tf32: bool) -> dict:
    """One site of the report: where it is, and its errors in each mode (None where a mode was not run)."""
    by_type = rounding_of(found.dtypes.get(site["output"], "float32"), tf32)
    rounding = max(by_type, low_precision(site))
    modes = {
        "fallback": (found.sites.get("fallback", {}).get(site["name"]), by_type),
        "propagated": (found.sites.get("library", {}).get(site["name"]), rounding),
        "local": (found.local.get(site["name"]), rounding),
    }
    keys = ("name", "layer", "module", "strategy", "num_samples", "precision", "error_tolerance", "noise", "shots", "output")
    entry = {key: site.get(key) for key in keys}
    entry |= {mode: errors.metrics(limit, level) if errors else None for mode, (errors, limit) in modes.items()}
    certificate = found.certificates.get(site["name"])
    entry["certificate"] = certificate.to_dict(found.local[site["name"]], rounding) if certificate else None
    if certificate and entry["local"]["bias"]["verdict"] == SYSTEMATIC:
        plausible = IMPLAUSIBLE * entry["certificate"]["relative_error"] + rounding
        if entry["local"]["relative_error"] <= plausible:
            entry["local"]["bias"]["verdict"] = ESTIMATED
    return entry


def _failures(outputs: dict, limits: dict, baseline: float | None) -> list[str]:
    """Why the verdict is "failed", one line each; `not <=` so that NaN fails."""
    reasons = []
    for mode, words in (("fallback", "without the library"), ("library", "with the library")):
        for name, metrics in outputs.get(mode, {}).items():
            if not metrics["relative_error"] <= limits[mode]:
                error = f"{metrics['relative_error']:.3g}"
                reasons.append(f"output {name!r} {words}: relative error {error} is above {limits[mode]:g}")
    if baseline is not None and not baseline <= max(limits["fallback"], 1e-3):
        reasons.append(
            f"the classical model's outputs differ from the stored ones by {baseline:.3g}; the files or the runtime changed"
        )
    return reasons


def _where(site: dict) -> dict:
    return {key: site[key] for key in ("name", "layer", "module")}


def first_divergent(sites: list[dict], limits: dict) -> dict | None:
    """The first site, in the order of the graph, that is wrong rather than noisy, or None.

    Wrong means: without the library its error is above the rounding tolerance (mode "fallback"); or with the library, fed
    with the classical values, its error has a systematic part above the limit (mode "local").
    """
    for site in sites:
        fallback, local = site["fallback"], site["local"]
        if fallback and not fallback["relative_error"] <= limits["sites"]:
            return {**_where(site), "mode": "fallback", "relative_error": fallback["relative_error"]}
        if local and local["bias"]["verdict"] == SYSTEMATIC:
            bias = local["bias"]["relative_bias"]
            if bias is None or not bias <= limits["local"]:
                return {**_where(site), "mode": "local", "relative_error": bias}
    return None


def _first_over(sites: list[dict], limits: dict) -> dict | None:
    """The first site whose error, as it runs through the converted model, is above the limit for the outputs."""
    for site in sites:
        mode, errors = ("library", site["propagated"]) if site["propagated"] else ("fallback", site["fallback"])
        if errors and not errors["relative_error"] <= max(limits[mode], limits["sites"]):
            return {**_where(site), "mode": mode, "relative_error": errors["relative_error"]}
    return None


def _worst(sites: list[dict]) -> dict | None:
    """The site with the largest error: its own where it is known, else as it runs through the model."""
    rated = [(site, site["local"] or site["propagated"] or site["fallback"]) for site in sites]
    rated = [(site, errors) for site, errors in rated if errors]
    if not rated:
        return None
    site, errors = max(rated, key=lambda pair: _or_infinite(pair[1]["relative_error"]))
    kind = "local" if site["local"] else "propagated" if site["propagated"] else "fallback"
    return {**_where(site), "mode": kind, "relative_error": errors["relative_error"], "worst_head": errors.get("worst_head")}


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _notes(report: ValidationReport, bundle: Bundle) -> list[str]:
    notes = []
    if report.sensitivity:
        name, change = max(report.sensitivity.items(), key=lambda item: item[1])
        notes.append(
            f"the model quantises as it runs: rounding alone moves output {name!r} by {change:.2g}, so outputs say little "
            "and the sites' own errors count too"
        )
    alone = [site for site in report.sites if site["local"]]
    verdicts = {site["local"]["bias"]["verdict"] for site in alone}
    drawn = [site for site in alone if site["strategy"] not in BLOCKWISE]
    certified = [site for site in alone if site["certificate"]]
    if drawn and all(site["local"]["bias"]["verdict"] == EXACT for site in drawn):
        notes.append(
            "no site had to sample: every query had at most num_samples keys; longer inputs show the sampling error"
        )
    if certified and not any(site["certificate"]["relative_error"] for site in certified):
        notes.append("tree read every key: the tolerance needs it here, or it is cheaper at this length")
        low = sorted({site["precision"] for site in certified} - {"fp32"})
        if low and all(site["local"]["bias"]["verdict"] == EXACT for site in certified):
            notes.append(f"what it errs by is rounding, at precision {', '.join(low)}; convert --precision fp32 has less")
    for site in alone:
        tolerance, error = site["error_tolerance"], site["local"]["relative_error"]
        if tolerance and not error <= max(tolerance, low_precision(site)):
            notes.append(
                f"attention {site['module'] or site['name']} errs by {error:.2g}, above its tolerance {tolerance:g}"
            )
    if report.first_divergent is None and report.reasons and SAMPLING in verdicts:
        notes.append("no site deviates systematically: the error is sampling noise, a larger num_samples lowers it")
    if report.first_divergent is None and report.reasons and ESTIMATED in verdicts:
        notes.append("tree errs as it estimates: a larger num_samples or a lower error_tolerance lowers the error")
    for name, metrics in report.outputs.get("library", {}).items():
        interval = metrics["relative_error_ci95"]
        if interval and interval[0] <= report.max_error["library"] <= interval[1]:
            notes.append(f"the limit lies inside the confidence interval of output {name!r}: more seeds settle it")
    if bundle.manifest.get("noise"):
        notes.append("without the library there is no noise and no measurement: those figures are the classical model's")
        if math.isinf(report.max_error["library"] or 0):
            notes.append("noise has no limit of its own, so the fallback alone is judged; --max-error judges the noise, too")
    if bundle.manifest.get("compression"):
        notes.append("the weights are compressed: outputs may err by 1.5 times what they did on the data that judged them")
    unseen = len(bundle.manifest["sites"]) - len(report.sites)
    if unseen:
        notes.append(f"{unseen} sites lie inside subgraphs and are compared end to end only")
    return notes
