"""The report of `sweep` as text for people."""

import click

from qexport.cli.text import ran_on, table
from qexport.words import percent, plural


def show_scaling(report, verbose: bool) -> None:
    """Times with their exponents, what a call needs and errs at the longest lengths, and who did not take part."""
    found = report.to_dict()
    settings, contenders = found["settings"], found["contenders"]
    lengths = settings["lengths"]
    shape = f"{plural(settings['heads'], 'head')} of {settings['head_size']}{', causal' if settings['causal'] else ''}"
    threads = plural(settings["threads"], "thread")
    click.echo(
        f"{shape}, inputs: {settings['inputs']}, {threads}, {found['machine']['processor']}"
        f"{ran_on(settings)}, {found['seconds']:.0f} s"
    )
    rows = [
        (c["name"], _exponent(c["fit"]), _last(c["fit"]), *(_at(c, n, lambda row: f"{row['ms']:.3g}") for n in lengths))
        for c in contenders
    ]
    table("Time in ms, and a of time ~ n^a with its 95 % interval", ("", "a", "last two", *map(str, lengths)), rows)
    rows = [(c["name"], *(_at(c, n, lambda row: percent(row["error_mean"])) for n in lengths)) for c in contenders]
    table("Relative error of a head, mean", ("", *map(str, lengths)), rows)
    rows = [(c["name"], *(_at(c, n, _megabytes) for n in lengths)) for c in contenders]
    table("Memory beside inputs and output, MB", ("", *map(str, lengths)), rows)
    bounded = [c for c in contenders if any(row["bound"] is not None for row in c["lengths"])]
    bounds = [(c["name"], *(_at(c, n, _bound) for n in lengths)) for c in bounded]
    if bounds:
        table("Least error of whoever reads as many values and nothing else", ("", *map(str, lengths)), bounds)
    if verbose:
        _show_spread(contenders)
    for c in contenders:
        if c["stopped"]:
            click.echo(f"{c['name']} was stopped at {c['stopped']['n']}: {c['stopped']['reason']}")
    for one in found["left_out"]:
        click.echo(f"{one['name']} was left out: {one['reason']}")


def _show_spread(contenders: list[dict]) -> None:
    """Every time with its quartiles and runs."""
    rows = [
        (c["name"], row["n"], f"{row['ms']:.4g}", f"{row['ms_p25']:.4g} to {row['ms_p75']:.4g}", row["runs"])
        for c in contenders
        for row in c["lengths"]
    ]
    table("Spread", ("", "n", "ms", "quartiles", "runs"), rows)


def _at(contender: dict, n: int, text) -> str:
    """What `text` says of the row of length n; blank where there is none."""
    return next((text(row) for row in contender["lengths"] if row["n"] == n), "")


def _exponent(fit: dict | None) -> str:
    if fit is None:
        return ""
    half = f" ± {(fit['ci95'][1] - fit['ci95'][0]) / 2:.2f}" if fit["ci95"] else ""
    return f"{fit['exponent']:.2f}{half}"


def _last(fit: dict | None) -> str:
    return f"{fit['last_exponent']:.2f}" if fit else ""


def _megabytes(row: dict) -> str:
    return f"{row['memory_bytes'] / 1e6:.3g}" if row["memory_bytes"] is not None else "n/a"


def _bound(row: dict) -> str:
    return percent(row["bound"]) if row["bound"] is not None else ""
