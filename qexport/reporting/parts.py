"""The parts of a report: taken from files, or made now by the functions that make them for their own commands."""

from dataclasses import dataclass
from pathlib import Path

from qexport.bundle import Bundle
from qexport.doctor import doctor
from qexport.documents import load_document, parts_of, well_formed
from qexport.errors import QexportError, UsageError
from qexport.inspection import inspect
from qexport.progress import portion
from qexport.runtime import check_start
from qexport.words import site_label

# Parts that take longer than a moment, in the order in which they are made.
MEASURED = ("validate", "profile", "samples", "scaling")
LENGTHS = (32, 64, 128, 256, 512)  # that are timed
# The sweep beside it: our way, the one without sampling, and what onnxruntime has.
SWEEP = {"lengths": (128, 256, 512, 1024, 2048), "strategies": ("exact", "default", "MultiHeadAttention"), "seconds": 1.0}


@dataclass(frozen=True)
class Wanted:
    """What is measured for a report, and how: the arguments of `qexport.report`."""

    data: object
    seq: object
    runs: int
    seeds: int
    max_error: float | None
    threads: int | None
    providers: list
    allow_fallback: bool
    skip: tuple[str, ...]

    @property
    def where(self) -> dict:
        """The arguments of what runs sessions."""
        return {"providers": self.providers, "allow_fallback": self.allow_fallback}


def gather(bundle: Bundle, wanted: Wanted, reuse, say) -> tuple[dict, dict, list[str]]:
    """(part to its document, part that is not there to the reason, what else to know).

    Raises:
        UsageError: a file to reuse that is of another model.
        QexportError: a file to reuse that is no report; validate or profile failed, or a provider cannot be had that
            something is to be measured on. The other parts are missing with the reason instead.
    """
    parts, notes = _reused(bundle, reuse)
    missing = {}
    if not all(name in parts or name in wanted.skip for name in MEASURED):
        check_start(**wanted.where)
    for number, name in enumerate(MEASURED):
        if name in parts:
            continue
        if name in wanted.skip:
            missing[name] = "it was skipped"
            continue
        try:
            parts[name] = _make(name, bundle, wanted, portion(say, number / len(MEASURED), (number + 1) / len(MEASURED)))
        except QexportError as error:
            # what a bundle is for must work; the rest does not fit every bundle
            if name in ("validate", "profile"):
                raise
            missing[name] = str(error)
    say("looking at the bundle and this machine", 1.0)
    parts["inspect"] = inspect(bundle.path)
    parts["doctor"] = [finding.to_dict() for finding in doctor()]
    return parts, missing, notes


def _reused(bundle: Bundle, files) -> tuple[dict, list[str]]:
    parts, notes = {}, []
    for file in files:
        found = parts_of(load_document(file), file)
        if "tune" in found:  # it measured budgets, too
            found.setdefault("samples", found["tune"])
        chosen = {name: document for name, document in found.items() if name in MEASURED}
        if not chosen:
            raise UsageError(
                f"{file}: holds {', '.join(found)}, of which a report shows nothing; it takes validate, profile, scaling, "
                "tune and report"
            )
        for name, document in chosen.items():
            with well_formed(f"{file}: its {name}"):
                _check_model(bundle, document, file)
            if name in parts:
                raise UsageError(f"{file}: {name} was given before; give each part once")
            made_of = document.get("bundle")
            if made_of is not None and Path(made_of).resolve() != bundle.path.resolve():
                notes.append(f"{name} comes from {Path(file).name}, which was made of {made_of}")
        parts |= chosen
    return parts, notes


def _check_model(bundle: Bundle, document: dict, file) -> None:
    """Whether a document is of the bundle's model: its file, where the document names it, and its attentions."""
    if (was := document.get("model_sha256")) and was != bundle.model_sha256:
        raise UsageError(
            f"{file}: was measured on another model than {bundle.path} holds, perhaps before it was converted again; "
            "measure that one"
        )
    measured = {site_label(site) for site in document.get("sites", [])}
    strangers = sorted(measured - {site_label(site) for site in bundle.manifest["sites"]})
    if strangers:
        raise UsageError(f"{file}: is of another model, its attention {strangers[0]!r} is not in {bundle.path}")


def _make(name: str, bundle: Bundle, wanted: Wanted, say) -> dict:
    """One part, made now."""
    if name == "validate":
        from qexport.validation import validate

        options = {"seeds": wanted.seeds, "max_error": wanted.max_error, **wanted.where}
        return validate(bundle, wanted.data, **options, progress=say).to_dict()
    if name == "profile":
        from qexport.profiling import profile

        seq = wanted.seq if wanted.seq is not None else lengths(bundle.manifest)
        options = {"runs": wanted.runs, "threads": wanted.threads, **wanted.where}
        return profile(bundle, seq=seq, **options, progress=say).to_dict()
    if name == "samples":
        from qexport.tuning.samples import error_by_samples

        return error_by_samples(bundle, wanted.data, threads=wanted.threads, **wanted.where, progress=say).to_dict()
    from qexport.scaling import sweep

    sites = bundle.manifest["sites"]
    shape = {"heads": sites[0]["q_heads"], "head_size": sites[0]["head_size"]} if sites else {}
    shape = {key: value for key, value in shape.items() if value}
    return sweep(**SWEEP, **shape, threads=wanted.threads or 1, **wanted.where, progress=say).to_dict()


def lengths(manifest: dict) -> list[int]:
    """Those of LENGTHS that the model takes, or its limit where that is less than all of them."""
    limit = min(manifest["limits"].values(), default=LENGTHS[-1])
    return [n for n in LENGTHS if n <= limit] or [limit]
