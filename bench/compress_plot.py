"""The picture of the tables of `bench.compress`: bytes saved against what is lost, and times."""

import re

BLUE, GREEN, ORANGE, GREYS = "#1f4e9c", "#2e8b57", "#d9822b", ("#444444", "#999999")
TITLES = {"minilm": "all-MiniLM-L6-v2", "char_gpt": "character-level GPT", "vit": "ViT-S/14"}


def draw(tables: dict[str, list[dict]], measures: dict[str, str], file: str) -> None:
    """Draws what the tables hold to `file`.

    Args:
        measures: what `loss` is in the table of each model.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5})
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7.4), layout="constrained")
    for axis, (name, measure) in zip(axes.flat, measures.items(), strict=False):
        _front(axis, tables[name])
        axis.set(title=TITLES[name], xlabel="times smaller than the float32 file", ylabel=measure)
    _times(axes.flat[len(measures)], [row for row in tables["latency"] if row["model"] == "minilm"])
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _front(axis, rows: list[dict]) -> None:
    for kind, colour, style in (("", BLUE, "o-"), (", healed", GREEN, "s-"), (", in int8", ORANGE, "v-")):
        found = [row for row in rows if re.fullmatch(rf"compress [\d.]+x{kind}", row["contender"])]
        found.sort(key=lambda row: row["ratio"])
        if found:
            axis.plot(*_points(found), style, color=colour, ms=5, label=f"qexport compress{kind}")
    others = [row for row in rows if row["contender"].startswith("onnxruntime")]
    for row, colour, mark in zip(others, GREYS, "D^", strict=False):
        axis.plot(*_points([row]), mark, color=colour, ms=6, label=row["contender"])
    axis.set_yscale("log")
    axis.set_xlim(left=1)
    axis.grid(alpha=0.25, which="both", lw=0.5)
    axis.legend(frameon=False, fontsize=7.5, loc="best")


def _points(rows: list[dict]) -> tuple[list[float], list[float]]:
    """A loss within the interval of its mean is drawn at the end of the interval, as it may be nothing at all."""
    return [row["ratio"] for row in rows], [max(row["loss"], row.get("ci95", 0)) for row in rows]


def _times(axis, rows: list[dict]) -> None:
    """Bars: how many times as long the classical model takes."""
    names = list(dict.fromkeys(row["contender"] for row in rows if row["contender"] != "classical"))
    sizes = list(dict.fromkeys((row["batch"], row["n"]) for row in rows))
    blues, greys = iter(("#0b2a5b", "#1f4e9c", "#5b86c9", "#a9c3ea", "#cfe0f7")), iter(GREYS)
    colours = {name: greys if name.startswith("onnxruntime") else blues for name in names}
    shades = {name: ORANGE if name.endswith("in int8") else next(colours[name]) for name in names}
    for i, name in enumerate(names):
        found = {(row["batch"], row["n"]): row["x_classical"] for row in rows if row["contender"] == name}
        places = [k + (i - (len(names) - 1) / 2) * 0.8 / len(names) for k in range(len(sizes))]
        axis.bar(places, [found[size] for size in sizes], 0.8 / len(names), color=shades[name], label=name)
    axis.axhline(1, color="#c0392b", lw=0.9)
    axis.set_xticks(range(len(sizes)), [f"{batch} x {n} tokens" for batch, n in sizes])
    axis.set(title="all-MiniLM-L6-v2", ylabel="times as fast as float32")
    axis.legend(frameon=False, fontsize=7.5, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.06))
