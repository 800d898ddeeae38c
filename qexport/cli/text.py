"""Pieces that the output of commands is made of: a progress line and tables."""

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
