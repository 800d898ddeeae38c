"""The answers of `report` and `compare` as text for people."""

import click

from qexport.cli.text import table
from qexport.words import megabytes, percent, plural


def show_report(report) -> None:
    """The verdict, what is not on the page, and where the page is."""
    for note in report.notes:
        click.echo(f"note: {note}")
    for part, reason in report.missing.items():
        click.echo(f"note: no {part}: {reason}")
    word = {True: "PASSED", False: "FAILED", None: "NOT CHECKED"}[report.passed]
    click.echo("\n".join([f"{word}: {report.headline}", *(f"FAILED: {reason}" for reason in report.reasons)]))
    click.echo(f"{report.output} is written: open it in a browser")


def show_comparison(found, verbose: bool) -> None:
    """The figures that changed, those that are worse first, and the verdict."""
    order = {"worse": 0, "better": 1, "within noise": 2, "not judged": 3, "same": 4}
    rows = sorted(found.figures, key=lambda figure: order[figure["verdict"]])
    shown = rows if verbose else [figure for figure in rows if figure["verdict"] != "same"]
    if shown:
        cells = [
            (
                figure["name"],
                *(_figure(figure[key], figure[f"{key}_interval"], figure["unit"]) for key in ("before", "after")),
                _change(figure),
                figure["verdict"],
            )
            for figure in shown
        ]
        table(f"From {found.before} to {found.after}", ("figure", "A", "B", "change", "verdict"), cells)
    if len(rows) > len(shown):
        click.echo(f"{plural(len(rows) - len(shown), 'figure')} did not change; --verbose shows them")
    for note in found.notes:
        click.echo(f"note: {note}")
    worse = [figure["name"] for figure in found.figures if figure["verdict"] == "worse"]
    if found.passed:
        unjudged = sum(figure["verdict"] == "not judged" for figure in rows)
        rest = f"; {unjudged} not judged" if unjudged else ""
        click.echo(f"PASSED: nothing is worse, of {plural(len(rows) - unjudged, 'figure')}{rest}")
    else:
        click.echo("\n".join(f"FAILED: {name} is worse" for name in worse))


def _figure(value: float | None, interval: list | None, unit: str) -> str:
    """A figure with the interval that its file states."""
    write = {
        "share": percent,
        "bytes": megabytes,
        "ms": lambda x: f"{x:.3g} ms",
        "verdict": lambda x: "passed" if x else "failed",
    }.get(unit, lambda x: f"{x:.3g}")
    if value is None:
        return "not finite"
    ends = [write(end) for end in interval or []]
    return write(value) + (f" ({' to '.join(ends)})" if set(ends) - {write(value)} else "")


def _change(figure: dict) -> str:
    """By how much of itself a figure changed; blank where that says nothing."""
    change = figure["change"]
    if change is None or figure["unit"] == "verdict":
        return ""
    return f"{100 * change:+.1f} %" if change < 10 else f"{1 + change:.0f} x"
