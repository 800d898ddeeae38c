"""The report of `compress` as text for people."""

from collections import Counter
from shlex import quote

import click

from qexport.cli.text import table
from qexport.words import percent, plural


def show_compression(report, verbose: bool) -> None:
    """What `compress` made: size, loss, time and memory beside the original's, and the forms of the weights."""
    found = report.to_dict()
    data, size, metric = found["data"], found["size"], found["metric"]
    click.echo(
        f"{found['path']} on {data['source']}: fitted to {plural(data['fitted'], 'item')}, judged on {data['judged']}, "
        f"{plural(len(found['trials']), 'trial')}, {found['seconds']:.0f} s"
    )
    for note in data["notes"] + found["notes"]:
        click.echo(f"note: {note}")
    _show_weights(found["layers"], verbose)
    errors = {name: entry["relative_error"] for name, entry in found["outputs"].items()}
    rows = [
        ("file", f"{size['before'] / 1e6:.2f} MB", f"{size['after'] / 1e6:.2f} MB", f"{size['ratio']:.2f} x smaller"),
        (metric["name"], f"{metric['classical']:.5g}", f"{metric['figure']:.5g}", f"loss {percent(metric['loss'])}"),
        *((f"error of {name}", "", "", percent(error)) for name, error in errors.items()),
        *_profile_rows(found["profile"]),
    ]
    table("Against the classical model", ("", "classical", "compressed", ""), rows)
    if not found["passed"]:
        click.echo("\n".join(f"FAILED: {reason}" for reason in found["reasons"]))
    click.echo(f"next: qexport validate {quote(found['path'])}")


def _show_weights(layers: list[dict], verbose: bool) -> None:
    if verbose:
        rows = [
            (
                layer["module"],
                layer["method"],
                "int8" if layer["int8_products"] else "",
                " x ".join(map(str, layer["shape"])),
                f"{layer['before'] / 1e3:.0f}",
                f"{layer['after'] / 1e3:.0f}",
                percent(layer["relative_error"]),
            )
            for layer in layers
        ]
        header = ("weight", "stored as", "products", "shape", "kB before", "kB", "error of its outputs")
        table("Weights", header, rows, text_columns=3)
        return
    kinds = Counter(layer["method"] for layer in layers)
    for method, count in kinds.most_common():
        group = [layer for layer in layers if layer["method"] == method]
        names = group[0]["module"] + (f" ... {group[-1]['module']}" if count > 1 else "")
        click.echo(f"  {count} x {method}: {names}")


def _profile_rows(profile: dict | None) -> list[tuple]:
    if profile is None:
        return []
    size = profile["sizes"][-1]
    before, after = size["models"]["classical"], size["models"]["converted"]
    where = f"batch {size['batch']}, {size['sequence'] or 'fixed'}"
    times = [model["latency_ms"]["p50"] for model in (before, after)]
    peaks = [model["memory"]["peak_bytes"] for model in (before, after)]
    faster = 1 / size["ratio"]["of_rounds"]["p50"]
    rows = [(f"latency p50 ({where})", *(f"{t:.2f} ms" for t in times), f"{faster:.2f} x as fast")]
    if None not in peaks:
        rows.append(("peak memory", *(f"{peak / 1e6:.0f} MB" for peak in peaks), f"{peaks[1] / peaks[0]:.2f} x as much"))
    return rows
