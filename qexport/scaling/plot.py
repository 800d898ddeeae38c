"""The picture of a sweep: time, memory and error against the length, one line per contender, with its exponent."""

from pathlib import Path

from qexport.plotting import figure_in

COLOURS = {
    "exact": "#1f4e9c",
    "default": "#000000",
    "tree": "#c0392b",
    "stratified": "#2a9fd6",
    "adaptive": "#2e8b57",
    "hybrid": "#8e44ad",
    "naive": "#c8a415",
    "MultiHeadAttention": "#444444",
    "Attention": "#888888",
    "GroupQueryAttention": "#aaaaaa",
    "SDPA": "#d9822b",
    "Performer": "#8d6e63",
    "Linformer": "#17807e",
    "top-k": "#e377c2",
    "uniform": "#7f9f3f",
}
MARKERS = "osD^v*"  # of the members of a family, one after the other
SHADE = 0.8  # how far from white the next member is, relative to the one before


def draw(report: dict, file) -> None:
    """Draw a report, as `ScalingReport.to_dict()` gives it, to a .png, .svg or .pdf.

    Raises:
        QexportError: the file cannot be written.
    """
    with figure_in(file, (15, 8)) as figure:
        time, memory, error = figure.subplots(1, 3)
        lengths, styles = report["settings"]["lengths"], _styles(report["contenders"])
        for contender in report["contenders"]:
            rows, style = contender["lengths"], styles[contender["name"]]
            label = contender["name"] + _exponent_text(contender["fit"]) + (" (stopped)" if contender["stopped"] else "")
            if not rows:
                continue
            _line(time, rows, "ms", 1, style | {"label": label})
            low, high = ([row[key] for row in rows] for key in ("ms_p25", "ms_p75"))
            time.fill_between([row["n"] for row in rows], low, high, color=style["color"], alpha=0.15, lw=0)
            _line(memory, rows, "memory_bytes", 1e-6, style)
            _line(error, rows, "error_mean", 100, style)
        handles = [*time.get_legend_handles_labels()[0], *_bounds(error, report["contenders"])]
        for axis, title in (
            (time, "time of a call, ms"),
            (memory, "memory beside inputs and output, MB"),
            (error, "relative error of a head, mean, %"),
        ):
            _scales(axis, lengths, title)
        figure.suptitle(_title(report), fontsize=12)
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)


def _styles(contenders: list[dict]) -> dict[str, dict]:
    """A colour for each family, a shade and a marker for each of its members; dashed lines for what is not ours."""
    from matplotlib.colors import to_rgb

    styles, members = {}, {}
    for contender in contenders:
        family = contender["strategy"]
        members[family] = members.get(family, -1) + 1
        styles[contender["name"]] = {
            "color": tuple(1 - (1 - part) * SHADE ** members[family] for part in to_rgb(COLOURS[family])),
            "marker": MARKERS[members[family]],
            "ls": "-" if contender["provider"] == "qexport" else "--",
            "lw": 1.4,
            "ms": 4.5,
        }
    return styles


def _line(axis, rows: list[dict], key: str, factor: float, style: dict) -> None:
    """`factor` times the figures that are there; 0 has no place on a logarithmic axis."""
    points = [(row["n"], factor * row[key]) for row in rows if row[key]]
    axis.plot([n for n, _ in points], [value for _, value in points], **style)


def _bounds(axis, contenders: list[dict]) -> list:
    """A dotted line for each bound that somebody has: those who read as many values share one. The lines."""
    seen, handles = [], []
    for contender in contenders:
        points = [(row["n"], 100 * row["bound"]) for row in contender["lengths"] if row["bound"]]
        if points and not any(set(points) <= set(other) for other in seen):
            seen.append(points)
            label = f"bound of {contender['name']}"
            handles += axis.plot(*zip(*points, strict=True), ":", color=COLOURS[contender["strategy"]], lw=2, label=label)
    return handles


def _scales(axis, lengths: list[int], title: str) -> None:
    """Logarithmic axes whose ticks are the lengths that were measured."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    measured = any(len(line.get_xdata()) for line in axis.lines)  # memory is not, behind CUDA
    axis.set_title(title if measured else f"{title}: no figures")
    axis.set_xlabel("queries and keys")
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.25, lw=0.5)
    if not measured:
        axis.set_yticks([])
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _exponent_text(fit: dict | None) -> str:
    """ ", n^1.93 ± 0.05" as matplotlib writes it; "" without a fit."""
    if fit is None:
        return ""
    half = f"\\pm {(fit['ci95'][1] - fit['ci95'][0]) / 2:.2f}" if fit["ci95"] else ""
    return f", $n^{{{fit['exponent']:.2f} {half}}}$"


def _title(report: dict) -> str:
    settings = report["settings"]
    inputs = "Gaussian inputs" if settings["inputs"] == "gaussian" else Path(settings["inputs"]).name
    threads = f"{settings['threads']} thread" + "s" * (settings["threads"] > 1)
    order = ", causal" if settings["causal"] else ""
    shape = f"{settings['heads']} head{'s' * (settings['heads'] > 1)} of {settings['head_size']}{order}, {inputs}, {threads}"
    return f"{shape}, {report['machine']['processor']}. Exponents: 95 % intervals"
