"""The picture of the tables of `bench.attention`: time against length in prefill and decoding, error against time."""

FRONT = "minilm-2048"  # the set whose errors are drawn
BLUE, CYAN, GREEN, RED, ORANGE = "#1f4e9c", "#2a9fd6", "#2e8b57", "#c0392b", "#d9822b"
GREYS = ("#444444", "#888888", "#aaaaaa")
PREFILL = {
    "exact fp32": (BLUE, "-"),
    "exact bf16": (CYAN, "-"),
    "exact int8": (GREEN, "-"),
    "tree 1/8": (RED, "-"),
    "default": (RED, ":"),
    "MultiHeadAttention": (GREYS[0], "--"),
    "Attention": (GREYS[1], "--"),
    "GroupQueryAttention": (GREYS[2], "--"),
    "torch SDPA": (ORANGE, "--"),
}
DECODE = {
    "exact fp32, past": (BLUE, ":"),
    "exact fp32, static cache": (BLUE, "-"),
    "exact, bf16 cache": (CYAN, "-"),
    "tree 1/8, static cache": (RED, "-"),
    "tree 1/64, static cache": (RED, ":"),
    "MultiHeadAttention, past": (GREYS[0], "--"),
    "Attention, static cache": (GREYS[1], "--"),
    "GroupQueryAttention, shared buffer": (GREYS[2], "--"),
    "torch SDPA, static cache": (ORANGE, "--"),
}


def draw(tables: dict[str, list[dict]], file: str) -> None:
    """Draws what the tables hold to `file`; panels without rows stay empty."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5})
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8.4), layout="constrained")
    prefill = [row for row in tables.get("prefill", []) if row["threads"] == 1]
    for axis, causal in ((axes[0, 0], False), (axes[0, 1], True)):
        rows = [row for row in prefill if row["causal"] == causal]
        _lines(axis, rows, PREFILL, "n", "ns_per_pair")
        axis.set_title(f"Prefill, {'causal' if causal else 'full'}, heads of 64, one thread")
        axis.set_ylabel("ns per (query, key) that is attended to")
        axis.set_xlabel("queries and keys")
    decode = [row for row in tables.get("decode", []) if row["threads"] == 1 and row["data"] == "gaussian"]
    _lines(axes[1, 0], decode, DECODE, "past", "ms")
    axes[1, 0].set_ylim(top=4 * axes[1, 0].get_ylim()[1])  # room for the legend above the lines
    axes[1, 0].set_title("Decoding one token, 8 heads of 64, one thread")
    axes[1, 0].set_ylabel("ms")
    axes[1, 0].set_xlabel("keys in the past")
    _front(axes[1, 1], [row for row in tables.get("activations", []) if row["data"] == FRONT])
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def _lines(axis, rows: list[dict], styles: dict, x: str, y: str) -> None:
    """Medians with their quartiles as a band, on logarithmic axes whose ticks are the lengths that were measured."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for name, (colour, dash) in styles.items():
        points = sorted(
            (row[x], row[y], row["ms_p25"] / row["ms"], row["ms_p75"] / row["ms"])
            for row in rows
            if row["contender"] == name
        )
        if not points:
            continue
        places, values, low, high = zip(*points, strict=True)
        axis.plot(places, values, dash, color=colour, label=name, lw=1.6, marker="o", ms=3)
        band = [[v * f for v, f in zip(values, factors, strict=True)] for factors in (low, high)]
        axis.fill_between(places, *band, color=colour, alpha=0.15, lw=0)
    ticks = sorted({row[x] for row in rows})
    axis.set_xticks(ticks, [f"{t // 1024}k" if t >= 1024 else str(t) for t in ticks])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25, which="both", lw=0.5)
    if rows:
        axis.legend(frameon=False, fontsize=7.5, ncols=2)


def _front(axis, rows: list[dict]) -> None:
    """Mean error of a head, 100 % being as large as the output, against time, 1 being MultiHeadAttention's."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_title(f"Error against time, trained activations ({FRONT})")
    axis.set_xlabel("time / time of MultiHeadAttention")
    axis.set_ylabel("relative error of a head, mean")
    axis.set_xscale("log")
    axis.set_yscale("log")
    families = {  # first words of the contender -> colour, marker
        "tree 1/": (RED, "o", "tree, share of the keys"),
        "tree,": (RED, "*", "tree, tolerance 0.1"),
        "default": ("black", "*", "what convert writes by itself"),
        "exact bf16": (CYAN, "s", "exact bf16"),
        "exact int8": (GREEN, "s", "exact int8"),
        "stratified": (BLUE, "D", "stratified, samples"),
        "top": ("#8e44ad", "^", "top-k, keys"),
        "uniform": (GREYS[1], "v", "uniform, share of the keys"),
        "Performer": (ORANGE, "P", "Performer"),
        "Linformer": ("#8d6e63", "X", "Linformer, rank"),
    }
    for start, (colour, marker, label) in families.items():
        chosen = [row for row in rows if row["contender"].startswith(start) and row["x_mha"]]
        plain = [row for row in chosen if ", " not in row["contender"] and "mean" not in row["contender"]]
        for part, filled in ((plain or chosen, True), ([r for r in chosen if "mean" in r["contender"]], False)):
            if not part:
                continue
            points = sorted((1 / row["x_mha"], row["error_mean"], row["contender"]) for row in part)
            style = {"marker": marker, "color": colour, "ms": 6, "lw": 1.2 if start == "tree 1/" else 0}
            style |= {"label": label} if filled else {"label": f"{label}, and mean V", "mfc": "none"}
            axis.plot([p[0] for p in points], [p[1] for p in points], **style)
            for time, error, contender in points if start not in ("tree,", "default") else []:
                tail = contender.removeprefix(start.rstrip("1/")).strip().split(" and")[0]
                axis.annotate(tail, (time, error), (5, 3), textcoords="offset points", fontsize=6.5, color=colour)
    axis.axvline(1, color=GREYS[0], lw=0.8, ls="--")
    axis.axhline(0.1, color=GREYS[2], lw=0.8, ls=":")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.25, which="both", lw=0.5)
    if rows:
        axis.legend(frameon=False, fontsize=7.5, loc="lower right")
