"""The report of `map_attention` as text for people."""

import click

from qexport.cli.text import ran_on, table
from qexport.words import percent, plural, site_label


def show_attention(maps, verbose: bool) -> None:
    """The figures of each layer, means over its heads (of each head with `verbose`), and where the pictures are."""
    found = maps.to_dict()
    click.echo(
        f"{found['bundle']} on {found['data']['source']}: {plural(len(found['items']), 'input')}, seed {found['seed']}"
        f"{ran_on(found['settings'])}"
    )
    for note in found["data"]["notes"] + found["notes"]:
        click.echo(f"note: {note}")
    for number, item in enumerate(found["items"], 1):
        rows = [row for site in item["sites"] for row in _rows(site, verbose)]
        title = f"Input {number}" if len(found["items"]) > 1 else ""
        header = ("site", "heads", "map", "entropy", "support", "looks elsewhere", "own error", "error in the model")
        table(title, header, rows)
    page, *pictures = found["files"]
    click.echo(f"open {page} in a browser" + (f"; {plural(len(pictures), 'picture')} beside it" if pictures else ""))


def _rows(site: dict, verbose: bool):
    groups = [[i] for i in range(len(site["heads"]))] if verbose else [range(len(site["heads"]))]
    for group in groups:

        def mean(key, group=group):
            values = [site[key][i] for i in group]
            return None if None in values else sum(values) / len(values)

        yield (
            site_label(site),
            str(site["heads"][group[0]]) if verbose else str(len(group)),
            f"{len(site['queries'])} x {len(site['keys'])}",
            f"{mean('entropy'):.2f}",
            f"{mean('support'):.1f}",
            *(percent(mean(key)) for key in ("moved", "own_error", "propagated_error")),
        )
