"""Pieces of text that the reports are made of: a progress line, tables, names and numbers."""

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


def progress_bar(silent: bool):
    """A function that shows a step and a bar of the share done on one line of stderr, or None when nobody watches it."""
    show = progress_line(silent)
    if show is None:
        return None

    def bar(step: str, done: float) -> None:
        filled = round(20 * min(max(done, 0.0), 1.0))
        show(f"{'█' * filled}{'░' * (20 - filled)} {100 * done:3.0f} % {step}")

    return bar


def table(title: str, header: tuple[str, ...], rows: list[tuple], text_columns: int = 1) -> None:
    """A table on stdout, without a head where `header` is blank.

    The first `text_columns` columns are text, the others numbers, aligned to the right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(header))
    for i, name in enumerate(header):
        number = i >= text_columns
        grid.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    # A pipe has no width: whole lines there, so that grep and diff see them.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(grid)


def samples_text(numbers: list[int]) -> str:
    """32, or "8 to 64" where the heads differ."""
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"


def site_label(site: dict) -> str:
    """How a site is called: its torch module where there is one, else its node."""
    return site.get("module") or site["name"]


def plural(count: int, word: str) -> str:
    """ "1 attention", "2 attentions"."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def recipe_text(
    strategy: str = "",
    num_samples=(),
    precision: str = "fp32",
    error_tolerance: float = 0.0,
    noise: str | None = None,
    shots=None,
    **_,
) -> str:
    """How a site is computed: "stratified, 32 samples", "tree, error up to 1 %, auto", "exact, bf16",
    "depolarizing:0.01, 1024 shots", or blank for attention that is not ours."""
    if noise:
        return f"{noise}, {shots} shots"
    parts = [strategy]
    if error_tolerance:
        parts.append(f"error up to {percent(error_tolerance)}")
    elif strategy not in ("", "exact"):
        parts.append(f"{samples_text(num_samples)} {'keys' if strategy == 'tree' else 'samples'}")
    if precision not in ("", "fp32"):
        parts.append(precision)
    return ", ".join(parts)


def percent(value: float | None) -> str:
    """A relative error with two digits that count: 190 %, 4.1 %, 0.012 %, 3.2e-07."""
    if value is None:
        return "not finite"
    if value == 0:
        return "0"
    if value >= 1:
        return f"{100 * value:.0f} %"
    return f"{value:.1e}" if value < 1e-5 else f"{100 * value:.2g} %"
