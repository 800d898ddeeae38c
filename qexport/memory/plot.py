"""The picture of a memory report: bytes over time, and how far each block rose above its start."""

from qexport.plotting import COLOURS, check_plot, figure_in


def draw(report: dict, file) -> None:
    """Draw a report, as `MemoryReport.to_dict()` gives it, to a .png, .svg or .pdf.

    Raises:
        UsageError: another kind of file, or a folder that is not there.
        QexportError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot(file)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(report["counters"])}
    blocks = report["blocks"]
    with figure_in(file, (13, max(4.5, 1.5 + 0.25 * len(blocks) * len(colours)))) as figure:
        over_time, rises = figure.subplots(1, 2)
        for name, line in report["timeline"].items():
            if line["bytes"]:
                over_time.plot(line["seconds"], [b / 1e6 for b in line["bytes"]], color=colours[name], lw=1.2, label=name)
        over_time.set_title("in use, MB")
        over_time.set_xlabel("seconds since the first block began")
        over_time.set_ylim(bottom=0)
        height = 0.8 / max(1, len(colours))
        for i, name in enumerate(colours):
            found = [(j, block["counters"][name]) for j, block in enumerate(blocks) if name in block["counters"]]
            ys, widths = [j + i * height for j, _ in found], [figures["rise_bytes"] / 1e6 for _, figures in found]
            rises.barh(ys, widths, height, color=colours[name])
        middle = 0.4 - height / 2
        rises.set_yticks([j + middle for j in range(len(blocks))], ["/".join(b["path"]) for b in blocks])
        rises.invert_yaxis()
        rises.set_title("most that a call rose above its start, MB")
        for axis in (over_time, rises):
            axis.grid(alpha=0.25, lw=0.5)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
