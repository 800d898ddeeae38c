"""report: everything that is known of a bundle, on one page that a browser shows without a network.

The page measures nothing itself. Its parts are the documents of `validate`, `profile`, `error_by_samples`, `sweep`,
`inspect` and `doctor`: those that are given as JSON files are taken from there, the others are made now, or left out with
the command that makes them.
"""

import datetime
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from qexport import __version__
from qexport._swap import check_file, whole_file
from qexport.arguments import as_path, several
from qexport.bundle import Bundle
from qexport.data import load_inputs
from qexport.documents import make_document, well_formed
from qexport.errors import QexportError, UsageError
from qexport.progress import listener
from qexport.providers import full_names, recorded
from qexport.reporting.judgement import verdict
from qexport.reporting.parts import MEASURED, Wanted, gather
from qexport.runtime import check_threads


@dataclass
class Report:
    """What `report` gathered. The attributes are the keys of its JSON, which docs/json_schema.md describes.

    Attributes:
        passed: the verdict of `validate` and of the files' hashes; None where nothing was validated.
        headline: the verdict in a sentence.
        parts: schema of a document without "qexport." to that document: validate, profile, samples, scaling, inspect, and
            the findings of doctor.
        missing: part to the reason why it is not there.
        settings: the providers of what was measured for it; parts have their own.
        output: the page.
    """

    bundle: str
    created: str
    parts: dict
    missing: dict
    notes: list[str]
    settings: dict
    output: str
    versions: dict
    passed: bool | None = None
    headline: str = ""
    reasons: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """The report as plain data."""
        return make_document("report", self.__dict__)


def report(
    bundle,
    output,
    data=None,
    *,
    reuse=(),
    skip=(),
    seq=None,
    runs: int = 30,
    seeds: int = 5,
    max_error: float | None = None,
    threads: int | None = None,
    providers=None,
    allow_fallback=False,
    progress=None,
) -> Report:
    """Write a page on a bundle: verdict, accuracy, error against samples, latency, memory, size, environment, recipe.

    Args:
        bundle: a folder, or a `Bundle`.
        output: the page, an .html file.
        data: inputs of what is measured for it, as for `qexport.validate`.
        reuse: JSON files of `validate`, `profile`, `scaling`, `tune` and `report`, whose figures are taken as they are.
        skip: parts that are not made now, of validate, profile, samples and scaling, or "all" of them.
        seq: lengths that are timed; 32 to 512, doubling, up to the model's limit, when None.
        runs, threads: as for `qexport.profile`.
        seeds, max_error: as for `qexport.validate`.
        providers, allow_fallback: where all that is measured now runs, as in `qexport.session`; the CPU when None.
        progress: called with the step in words and the share that is done, 0 to 1.

    Raises:
        UsageError: a wrong argument, `providers` as in `qexport.session`, or a file to reuse that is of another model.
        QexportError: the bundle, the data, a file to reuse that is no report, the runtime or its providers are at fault, or
            the page cannot be written.
    """
    from qexport.reporting.page import page

    target = _check_output(output)
    unknown = sorted(set(several("skip", skip)) - {*MEASURED, "all"})
    if unknown:
        raise UsageError(f"skip: no part {unknown[0]!r}; parts: {', '.join(MEASURED)}, all")
    check_threads(threads)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if data is not None:
        data = load_inputs(opened, data)  # a wrong file is told, also where all that reads it is skipped or reused
    skipped = MEASURED if "all" in skip else tuple(skip)
    wanted = Wanted(data, seq, runs, seeds, max_error, threads, full_names(providers), allow_fallback, skipped)
    parts, missing, notes = gather(opened, wanted, reuse, listener(progress))
    found = Report(
        bundle=str(opened.path),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        parts=parts,
        missing=missing,
        notes=notes,
        settings=recorded(**wanted.where),
        output=str(target),
        versions={"qexport": __version__},
    )
    # what was made here has its form; files may hold anything
    with well_formed(f"{', '.join(map(str, reuse))}: a part") if reuse else nullcontext():
        found.passed, found.headline, found.reasons = verdict(parts)
        found.notes += parts.get("validate", {}).get("notes", [])
        text = page(found.to_dict(), opened.manifest)
    _write(target, text)
    return found


def _check_output(output) -> Path:
    """Find out before anything runs whether the page can be written."""
    target = as_path("output", output)
    if target.suffix not in (".html", ".htm"):
        raise UsageError(f"{target}: the page is an .html file; call it so")
    check_file(target)
    return target


def _write(target: Path, text: str) -> None:
    """Complete or not at all."""
    try:
        with whole_file(target) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise QexportError(f"{target}: cannot be written ({error.strerror or error}); choose another folder") from error
