"""Attention maps as matplotlib figures; matplotlib comes with the extra [plot].

Probabilities are drawn on a scale of their square roots, from 0 to the largest of the site, differences likewise to both
sides of 0: most rows have one large entry and many small ones, and both are to be seen. Maps of more cells than dots are
drawn in blocks of cells, each as its largest entry.
"""

import math

import numpy as np

from qexport.attention.maps import MEASURES, SHARES, SiteMap, entropy, largest_in_blocks, site_labels
from qexport.errors import QexportError

# Inches that the name of a token takes, and a character of a title; the largest side of a map whose tokens are all named.
LABEL, TITLE, LARGEST_NAMED = 0.13, 0.095, 5.2
SIDE = (2.2, 4.0)  # of a map: the least, and of one that is too long for all names
COLUMNS = 4
DPI = 110
_LONGEST_NAME = 14


def matplotlib():
    """The module, which draws into files alone.

    Raises:
        QexportError: it is not installed.
    """
    try:
        import matplotlib as module
        import matplotlib.figure
    except ImportError as error:
        raise QexportError(
            f"pictures need matplotlib ({error}): pip install 'qexport[plot]', or leave them out with --no-pictures"
        ) from None
    return module


def save(figure, path) -> None:
    """Write a figure as a PNG file."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a script that the font lacks
        figure.savefig(path, dpi=DPI)


def plot_site(site: SiteMap, what: str = "classical"):
    """A map per head of one site, with the tokens at its sides; `what` is "classical", "sampled" or "difference"."""
    rows = math.ceil(len(site.heads) / COLUMNS)
    columns = math.ceil(len(site.heads) / rows)
    width, x_step = _side(len(site.keys))
    height, y_step = _side(len(site.queries))
    title = f"layer {site.layer}{_module(site)}: {_TITLES[what]}"
    size = (max(columns * (width + 0.25) + 2.2, TITLE * len(title)), rows * (height + 0.35) + 1.8)
    figure = matplotlib().figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    measures = site.measures()
    for i, ax in enumerate(axes.flat):
        if i >= len(site.heads):
            ax.set_axis_off()
            continue
        image = _draw(ax, getattr(site, what)[i], width, height, **_style(what, _top(site, what)))
        moved = f"{100 * measures['moved'][i]:.2g} % looks elsewhere"
        number = moved if what == "difference" else f"H = {entropy(getattr(site, what)[i]).mean():.2f}"
        ax.set_title(f"head {site.heads[i]}: {number}", fontsize=9)
        below = i + columns >= len(site.heads)
        ax.tick_params(labelbottom=below, labelleft=i % columns == 0, labelsize=6.5, length=2)
        _name_axis(ax.set_xticks, site.keys, x_step, rotation=90)
        _name_axis(ax.set_yticks, site.queries, y_step)
    figure.suptitle(title, fontsize=11)
    figure.supxlabel("key", fontsize=9)
    figure.supylabel("query", fontsize=9)
    figure.colorbar(image, ax=axes, fraction=0.02, aspect=40, label=_SCALES[what])
    return figure


def plot_all(item: list[SiteMap], what: str = "classical"):
    """A small map for every layer (downwards) and head (across)."""
    heads = sorted({head for site in item for head in site.heads})
    cell = min(1.5, max(0.8, 14 / max(len(heads), len(item))))
    title = f"{_TITLES[what]}: layers downwards, heads across"
    size = (max(len(heads) * cell + 2.4, TITLE * len(title)), len(item) * cell + 1.3)
    figure = matplotlib().figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(item), len(heads), squeeze=False)
    labels = site_labels(item)
    for row, site in enumerate(item):
        for column, head in enumerate(heads):
            ax = axes[row, column]
            ax.set(xticks=[], yticks=[])
            if row == 0:
                ax.set_title(str(head), fontsize=9)
            if column == 0:
                ax.set_ylabel(labels[row], fontsize=9, rotation=0, ha="right", va="center")
            if head in site.heads:
                share = getattr(site, what)[site.heads.index(head)] / _top(site, what)
                image = _draw(ax, share, cell, cell, **_style(what, 1.0))
            else:
                ax.set_axis_off()
    figure.suptitle(title, fontsize=11)
    label = f"{_SCALES[what]}, as a share of the largest in its layer"
    figure.colorbar(image, ax=axes, fraction=0.02, aspect=40, label=label)
    return figure


def plot_summary(item: list[SiteMap]):
    """Every measure of `MEASURES` as a matrix of layers x heads, and its mean over the heads of a layer."""
    heads = sorted({head for site in item for head in site.heads})
    size = (3 * (0.42 * (len(heads) + 1) + 1.6), 2 * (0.3 * len(item) + 1.1))
    figure = matplotlib().figure.Figure(figsize=(max(size[0], 12), max(size[1], 5)), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for ax, (key, title) in zip(axes, MEASURES.items(), strict=False):
        matrix = np.full((len(item), len(heads) + 1), np.nan)
        for row, site in enumerate(item):
            values = site.measures()[key] * (100 if key in SHARES else 1)
            matrix[row, [heads.index(head) for head in site.heads]] = values
            matrix[row, -1] = values.mean()
        matrix[~np.isfinite(matrix)] = np.nan  # left blank
        image = ax.imshow(matrix, aspect="auto", cmap="viridis")
        ax.axvline(len(heads) - 0.5, color="white", linewidth=2)
        ax.set_title(title, fontsize=10)
        ax.set_xticks(range(len(heads) + 1), [*map(str, heads), "mean"], fontsize=8)
        ax.set_yticks(range(len(item)), site_labels(item), fontsize=8)
        ax.set_xlabel("head", fontsize=8)
        ax.set_ylabel("layer", fontsize=8)
        _write_numbers(ax, matrix)
        figure.colorbar(image, ax=ax, fraction=0.05)
    for ax in axes[len(MEASURES) :]:
        ax.set_axis_off()
    return figure


_TITLES = {
    "classical": "classical attention",
    "sampled": "attention in the sampled model",
    "difference": "sampled - classical",
}
_SCALES = {"classical": "probability", "sampled": "probability", "difference": "difference of probability"}


def _module(site: SiteMap) -> str:
    return f" ({site.module})" if site.module else ""


def _side(count: int) -> tuple[float, int]:
    """Inches of a map's side of `count` tokens, and which of them are named: every so many."""
    if count * LABEL <= LARGEST_NAMED:
        return max(SIDE[0], count * LABEL), 1
    least = count * LABEL / SIDE[1]
    decade = 10 ** math.floor(math.log10(least))
    return SIDE[1], next(factor * decade for factor in (1, 2, 5, 10) if factor * decade >= least)


def _top(site: SiteMap, what: str) -> float:
    """The largest value on the scale; 1 for the difference of equal models."""
    return site.top if what != "difference" else site.top_difference or 1.0


def _style(what: str, top: float) -> dict:
    """Colours, and a scale from 0 or -top to top."""
    from matplotlib.colors import FuncNorm, PowerNorm

    if what != "difference":
        return {"cmap": "Blues", "norm": PowerNorm(0.5, 0, top)}
    signed = (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x))
    return {"cmap": "RdBu_r", "norm": FuncNorm(signed, -top, top)}


def _draw(ax, values: np.ndarray, width: float, height: float, **style):
    """A matrix on axes of so many inches."""
    blocks = [max(1, size // int(inches * DPI)) for size, inches in zip(values.shape, (height, width), strict=True)]
    shown = largest_in_blocks(values, *blocks)
    extent = (-0.5, shown.shape[1] * blocks[1] - 0.5, shown.shape[0] * blocks[0] - 0.5, -0.5)
    image = ax.imshow(shown, extent=extent, aspect="auto", interpolation="nearest", **style)
    rows, columns = values.shape  # the last block may reach beyond them
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    return image


def _name_axis(set_ticks, tokens: list[str], step: int, **text) -> None:
    for label in set_ticks(range(0, len(tokens), step), [_shown(token) for token in tokens[::step]], **text):
        label.label1.set_parse_math(False)  # a dollar sign is a token


def _shown(token: str) -> str:
    """A token as it fits at an axis: one line, no control characters, not too long."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)
    return text if len(text) <= _LONGEST_NAME else text[: _LONGEST_NAME - 1] + "…"


def _digits(value: float) -> str:
    """A figure as it fits into a cell: 143, 4.7, 0.03, 3e-4."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2g}" if value >= 1e-3 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def _write_numbers(ax, matrix: np.ndarray) -> None:
    """The values in their cells, where they are not too many to be read."""
    if matrix.size > 20 * 20 or np.isnan(matrix).all():
        return
    low, high = np.nanmin(matrix), np.nanmax(matrix)
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            ink = "black" if high > low and (value - low) / (high - low) > 0.6 else "white"
            ax.text(column, row, _digits(value), ha="center", va="center", fontsize=6.5, color=ink)
