"""What `profile --memory` shows of one model."""

import click

from qexport.cli.text import table
from qexport.memory.counters import NOT_ASKED
from qexport.memory.text import leak_text, ratio_text, size_text

KEYS = ("peak_bytes", "rise_bytes", "left_bytes")


def show_memory(which: str, size: str, model: dict, runtime: str, verbose: bool) -> None:
    """Peaks of loading and running by counter, the verdict on leaks, efficiency, and the nodes that raised the peak."""
    report = model["memory"]["profile"]
    rows = [
        ("/".join(block["path"]), counter, *(size_text(figures[key]) for key in KEYS), figures["peak_is"])
        for block in report["blocks"]
        for counter, figures in block["counters"].items()
        if figures["rise_bytes"] or verbose
    ]
    table(f"Memory, {which}, {size}", ("block", "counter", "peak", "rise", "left behind", "peak is"), rows, text_columns=2)
    blocks = {"/".join(block["path"]): block for block in report["blocks"]}
    runs = blocks["model/run"]
    click.echo(f"leak in {runs['calls']} runs: {leak_text(runs['leak'])}")
    for path, block in blocks.items():
        for name, ratio in block["efficiency"].items():
            if ratio:
                click.echo(f"{name.replace('_', ' ')} of {path}: {ratio_text(ratio)}")
    _show_peaks(which, model["nodes"], runtime, verbose)
    for name, reason in report["absent"].items():
        if name != "onnxruntime" and reason != NOT_ASKED:  # the one is told above, from the trace
            click.echo(f"absent {name}: {reason}")


def _show_peaks(which: str, nodes: list[dict], runtime: str, verbose: bool) -> None:
    """The nodes that raised the peak of onnxruntime's arena, those that raised it most first."""
    known = [node for node in nodes if node["memory_peak_bytes"] is not None]
    if not known:
        click.echo(f"memory per node: onnxruntime {runtime} does not tell; 1.31 does")
        return
    raised = sorted((n for n in known if n["memory_peak_raised_bytes"]), key=lambda n: -n["memory_peak_raised_bytes"])
    rows = [
        (n["name"], n["op"], *(size_text(n[f"memory_{key}_bytes"]) for key in ("peak_raised", "peak", "delta")))
        for n in raised[: None if verbose else 6]
    ]
    header = ("node", "op", "raised the peak by", "to", "left allocated")
    table(f"Arena of onnxruntime, node by node, {which}", header, rows, text_columns=2)
