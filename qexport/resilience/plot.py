"""The picture of a sweep: what the model loses and how far its attention is off, against the level of noise."""

from __future__ import annotations

import math

from qexport.plotting import COLOURS, figure_in
from qexport.words import plural

STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^v"


def draw(report: dict, file) -> None:
    """Draw a report, as `ResilienceReport.to_dict()` gives it, to a .png, .svg or .pdf.

    Raises:
        QexportError: the file cannot be written.
    """
    with figure_in(file, (11, 5.2)) as figure:
        loss, attention = figure.subplots(1, 2)
        settings, name = report["settings"], report["metric"]["name"]
        for line, look in _lines(report):
            _band(loss, line, "loss", look)
            _band(attention, line, "attention_error", look)
        tolerance = 100 * settings["tolerance"]
        loss.axhline(tolerance, color="black", lw=0.8)
        loss.annotate(f"tolerance {tolerance:g} %", (0, tolerance), (3, 3), textcoords="offset points", fontsize=9)
        for found, (_, look) in zip(report["thresholds"], _lines(report), strict=True):
            if found["level"] is not None:
                loss.plot([found["level"]], [tolerance], marker="x", color=look["color"], ms=8, mew=2, ls="none")
        _scales(loss, settings["levels"], f"loss of {name}, %", tolerance / 10)
        loss.set_ylim(top=max(loss.get_ylim()[1], 3 * tolerance))  # room for the words above the line
        _scales(attention, settings["levels"], "error of an attention's output, %", 1.0)
        items = plural(report["data"]["samples"], "item")
        classical = f"classical {name} {report['metric']['classical']:.4g}"
        figure.suptitle(f"{settings['noise']}, {items}, {classical}; bands: 95 % over seeds", fontsize=11)
        figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def _lines(report: dict):
    """(the cells of one line, how it looks): a colour for each mitigation, or number of shots where there is but one, a dash
    and a marker for each number of shots."""
    settings = report["settings"]
    single = len(settings["mitigation"]) == 1
    for m, mitigation in enumerate(settings["mitigation"]):
        for s, shots in enumerate(settings["shots"]):
            cells = [c for c in report["cells"] if (c["mitigation"], c["shots"]) == (mitigation, shots)]
            yield (
                cells,
                {
                    "color": COLOURS[(s if single else m) % len(COLOURS)],
                    "ls": STYLES[s % len(STYLES)],
                    "marker": MARKERS[s % len(MARKERS)],
                    "label": f"{mitigation}, {shots} shots",
                    "lw": 1.4,
                    "ms": 4.5,
                },
            )


def _band(axis, cells: list[dict], key: str, look: dict) -> None:
    """The means in percent with their intervals; gaps where the model gave no numbers."""
    levels = [cell["level"] for cell in cells]
    axis.plot(levels, _percents(cell[key]["mean"] for cell in cells), **look)
    low, high = zip(*(cell[key]["ci95"] or [cell[key]["mean"]] * 2 for cell in cells), strict=True)
    axis.fill_between(levels, _percents(low), _percents(high), color=look["color"], alpha=0.15, lw=0)


def _percents(shares) -> list[float]:
    return [math.nan if share is None else 100 * share for share in shares]


def _scales(axis, levels: list[float], title: str, linear: float) -> None:
    """Axes that are logarithmic but for what lies around 0; the ticks are the levels that were measured."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    axis.set_title(title)
    axis.set_xlabel("level of noise")
    axis.set_xscale("symlog", linthresh=min((level for level in levels if level), default=1.0))
    axis.set_xticks(levels, [f"{level:g}" for level in levels], rotation=45)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yscale("symlog", linthresh=linear)
    axis.set_ylim(bottom=min(0, axis.dataLim.y0))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25, lw=0.5)
