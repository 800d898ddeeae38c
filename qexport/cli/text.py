"""Pieces that the output of commands is made of: a progress bar and tables."""

import sys
from contextlib import contextmanager


@contextmanager
def progress_bar(silent: bool):
    """Shows on stderr how far the block is: a bar, the time so far and the step; nothing when nobody watches.

    Yields the function that the library calls with a step in words and the share that is done, 0 to 1, or None. It draws
    when it is called and not in between, so that what is timed has no thread beside it.
    """
    if silent or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.table import Column

    bar = Progress(
        BarColumn(20),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        expand=True,
    )
    with bar:
        task = bar.add_task("starting", total=1)
        bar.refresh()
        yield lambda step, done: bar.update(task, description=step, completed=done, refresh=True)


def ran_on(settings: dict) -> str:
    """The providers in the settings of a report, for its head line; nothing for the CPU alone."""
    from qexport.providers import CPU, asked_for

    names = asked_for(settings)
    return "" if names == [CPU] else f", {', '.join(names)}"


def table(title: str, header: tuple[str, ...], rows: list[tuple], text_columns: int = 1) -> None:
    """A table on stdout, without a head where `header` is blank.

    The first `text_columns` columns are text, the others numbers, aligned to the right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(header))
    for i, name in enumerate(header):
        number = i >= text_columns
        grid.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    # A pipe has no width: whole lines there, so that grep and diff see them.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200)
    if title:  # by itself: as the grid's own title it would wrap at the width of a narrow grid
        console.print(Text(title, style="table.title"))
    console.print(grid)
