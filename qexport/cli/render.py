"""Reports as text for people."""

import sys

import click


def progress_line(silent: bool):
    """A function that shows the current step on one line of stderr, or None when nobody watches it."""
    if silent or not sys.stderr.isatty():
        return None

    def show(step: str) -> None:
        click.echo(f"\r\x1b[K{step} ...", nl=False, err=True)

    click.get_current_context().call_on_close(lambda: click.echo("\r\x1b[K", nl=False, err=True))
    return show


def table(title: str, header: tuple[str, ...], rows: list[tuple], text_columns: int = 1) -> None:
    """A table on stdout; the first `text_columns` columns are text, the others numbers, aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        number = i >= text_columns
        grid.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    console = Console(file=sys.stdout)
    # A pipe has no width: print whole lines there, so that grep and diff see them.
    console.print(grid, width=None if console.is_terminal else 200)


def samples_text(numbers: list[int]) -> str:
    """32, or "8 to 64" where the heads differ."""
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"


def site_label(site: dict) -> str:
    """How a site is called: its torch module where there is one, else its node."""
    return site.get("module") or site["name"]


def plural(count: int, word: str) -> str:
    """"1 attention", "2 attentions"."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def show_conversion(report, verbose: bool) -> None:
    """What `convert` did."""
    found = len(report.sites) + len(report.left_alone)
    verb = "converted" if report.path else "would be converted"
    click.echo(f"{len(report.sites)} of {plural(found, 'attention')} {verb}")
    kinds: dict[tuple, list[dict]] = {}
    for site in report.sites:
        heads = (site["q_heads"], site["kv_heads"], site["head_size"])
        kinds.setdefault((site["strategy"], samples_text(site["num_samples"]), *heads), []).append(site)
    if verbose:
        rows = [(site_label(s), s["strategy"], samples_text(s["num_samples"]), s["q_heads"], s["head_size"]) for s in report.sites]
        table("", ("site", "strategy", "samples", "heads", "head size"), rows, text_columns=2)
    else:
        for (strategy, samples, q_heads, kv_heads, size), sites in kinds.items():
            heads = f"{q_heads} heads" if q_heads == kv_heads else f"{q_heads} heads on {kv_heads}"
            names = site_label(sites[0]) + (f" ... {site_label(sites[-1])}" if len(sites) > 1 else "")
            how = strategy if strategy == "exact" else f"{strategy}, {samples} samples"
            click.echo(f"  {len(sites)} x {how}, {heads} of {size}: {names}")
    for site in report.left_alone:
        click.echo(f"  left alone {site_label(site)}: {site['reason']}")
    for note in report.notes:
        click.echo(f"note: {note}")
    if report.path:
        manifest = report.manifest
        size = sum(entry["bytes"] for entry in manifest["files"].values())
        click.echo(
            f"{report.path}: {size / 1e6:.1f} MB, opset {manifest['opset']}, runs in onnxruntime {manifest['min_onnxruntime']} "
            "and newer"
        )
        click.echo(f"next: qexport validate {report.path}")
