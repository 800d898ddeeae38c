"""compare: what changed between two JSON documents of qexport, and is anything worse beyond its noise?

One rule for every figure: it changed when it moved by more than a share of itself (the threshold), by more than what is
rounding (its floor), and when the intervals that the two documents state for it do not meet. Two 95 % confidence intervals
of equal width that do not meet are a difference at about the .6 % level, so a page of figures raises few false alarms.
"""

import math
from dataclasses import dataclass, field

from qexport.arguments import real
from qexport.comparison.figures import FIGURES, VERDICTS, Figure, Part
from qexport.documents import load_document, make_document, parts_of, well_formed
from qexport.errors import UsageError

WORSE, BETTER, NOISE, UNJUDGED, SAME = "worse", "better", "within noise", "not judged", "same"


@dataclass
class Comparison:
    """What `compare` found. The attributes are the keys of its JSON, which docs/json_schema.md describes.

    Attributes:
        passed: whether no figure is worse.
        figures: one dict each: its `name`, `part` and `unit`, what it is in both documents and its `verdict`.
        notes: what was not judged, and why.
    """

    before: str
    after: str
    passed: bool
    threshold: float
    figures: list[dict]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """The comparison as plain data."""
        return make_document("compare", self.__dict__)


def compare(before, after, *, threshold: float = 0.05) -> Comparison:
    """Hold the figures of a JSON file against those of an earlier one.

    Args:
        before, after: files that commands printed with --json, of the same kind and model.
        threshold: changes up to this share of the earlier figure never count.

    Raises:
        UsageError: the two are of different kinds, models, sizes or inputs, no figure can be judged, or `threshold` < 0.
        QexportError: a file is missing, or no report.
    """
    if not 0 <= real("threshold", threshold) < math.inf:
        raise UsageError(f"threshold must be a number >= 0, got {threshold}")
    documents = [parts_of(load_document(file), file) for file in (before, after)]
    known = [[name for name in document if name in FIGURES] for document in documents]
    common = [name for name in known[0] if name in known[1]]
    if not common:
        held = [", ".join(document) for document in documents]
        raise UsageError(
            f"{before} and {after} cannot be compared: the first holds {held[0]}, the second {held[1]}; "
            f"figures are in {', '.join(FIGURES)}"
        )
    figures, notes = [], []
    for name in common:
        pair = []
        for document, file in zip(documents, (before, after), strict=True):
            with well_formed(f"{file}: its {name}"):
                pair.append(FIGURES[name](document[name]))
        _check_same(pair, name, before, after)
        figures += _figures(name, *pair, threshold, notes)
        for which, others, file in ((0, 1, before), (1, 0, after)):
            alone = [key for key in pair[which].figures if key not in pair[others].figures]
            if alone:
                notes.append(f"{len(alone)} figures of {name} are in {file} alone, such as {alone[0]}")
    for names, file in zip(known, (before, after), strict=True):
        if alone := [name for name in names if name not in common]:
            notes.append(f"{', '.join(alone)} is in {file} alone")
    if not figures:
        raise UsageError(f"{before} and {after} have no figure in common: they are of different sizes or settings")
    if all(figure["verdict"] == UNJUDGED for figure in figures):
        why = notes[0] if notes else "they are shown only"
        raise UsageError(f"{before} and {after} cannot be compared, of {len(figures)} figures none is judged: {why}")
    passed = all(figure["verdict"] != WORSE for figure in figures)
    return Comparison(str(before), str(after), passed, threshold, figures, notes)


def _check_same(pair: list[Part], name: str, before, after) -> None:
    """Whether two parts are of the same model and inputs."""
    for key in pair[0].identity.keys() & pair[1].identity.keys():
        value, other = (part.identity[key] for part in pair)
        if value != other:
            what = f"{key} of {name}: {_short(value)} against {_short(other)}"
            raise UsageError(f"{before} and {after} are of different models or inputs, {what}")


def _short(value) -> str:
    words = str(value)
    return words if len(words) <= 80 else words[:79] + "…"


def _figures(name: str, before: Part, after: Part, threshold: float, notes: list[str]) -> list[dict]:
    """The figures that both parts have."""
    differ = [kind for kind in before.terms if before.terms[kind] != after.terms[kind]]
    notes += [f"{kind} of {name} are not judged: {before.terms[kind]} against {after.terms[kind]}" for kind in differ]
    found = []
    for key, old in before.figures.items():
        new = after.figures.get(key)
        if new is None:
            continue
        verdict = judge(old, new, threshold)
        control = old.control and judge(before.figures[old.control], after.figures[old.control], threshold)
        if control in (WORSE, BETTER) and verdict not in (SAME, UNJUDGED):
            notes.append(f"{key} is not judged: {old.control}, which measures the machine, changed as well")
            verdict = UNJUDGED
        if verdict != SAME and (old.kind in differ or not old.judged):
            verdict = UNJUDGED
        found.append(
            {
                "part": name,
                "name": key,
                "unit": old.unit,
                "before": old.value,
                "after": new.value,
                "before_interval": old.interval,
                "after_interval": new.interval,
                "change": new.value / old.value - 1 if (old.value or 0) > 0 and new.value is not None else None,
                "verdict": verdict,
            }
        )
    return found


def judge(old: Figure, new: Figure, threshold: float) -> str:
    """One of WORSE, BETTER, NOISE and SAME. A figure that is None is not finite, and worse than any that is."""
    if old.value == new.value:
        return SAME
    if old.value is None or new.value is None:
        return WORSE if new.value is None else BETTER
    moved = abs(new.value - old.value)
    low, high = sorted((old, new), key=lambda figure: figure.value)
    apart = low.interval is None or high.interval is None or low.interval[1] < high.interval[0]
    least = 0.0 if old.kind == VERDICTS else threshold * abs(old.value)
    if not apart or moved <= max(least, old.floor, new.floor):
        return NOISE
    return WORSE if (new.value > old.value) == old.lower_is_better else BETTER
