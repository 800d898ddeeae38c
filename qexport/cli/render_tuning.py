"""The report of `tune` as text for people."""

from collections import Counter
from shlex import quote

import click

from qexport.cli.text import ran_on, table
from qexport.words import percent, plural, recipe_text, site_label


def setting_text(setting: dict) -> str:
    """A setting as `recipe_text` writes it, with the residual where it changes the output."""
    numbers = setting.get("num_samples", 32)
    text = recipe_text(**setting | {"num_samples": numbers if isinstance(numbers, list) else [numbers]})
    residual = setting.get("residual")
    return f"{text}, {residual}" if residual in ("unbiased", "james_stein") else text


def show_tuning(report, verbose: bool) -> None:
    """What `tune` found: the front, the recipe site by site, where it is now."""
    found = report.to_dict()
    click.echo(
        f"{found['bundle']} on {found['data']['source']}: {plural(found['data']['samples'], 'item')}, "
        f"{plural(found['trials'], 'recipe')} tried in {found['seconds']:.0f} s"
        f"{ran_on(found['settings'])}"
    )
    for note in found["data"]["notes"] + found["notes"]:
        click.echo(f"note: {note}")
    shown = [c for c in found["candidates"] if verbose or c["on_front"] or not c["label"].startswith("tuned")]
    shown.sort(key=lambda c: _time_ratio(c) or float("inf"))
    rows = [_candidate_row(c, c["label"] == found["best"]["label"] and found["passed"]) for c in shown]
    header = ("recipe", "error", "time", "time ratio", "95 %", "")
    table("Time, and its ratio to the classical model", header, rows)
    _show_sites(found, verbose)
    if not found["passed"]:
        click.echo("\n".join(f"FAILED: {reason}" for reason in found["reasons"]))
        return
    best = found["best"]
    interval = best["ratio"]["median_ci95"]
    spread = f" (95 %: {1 / interval[1]:.2f} to {1 / interval[0]:.2f})" if interval else ""
    faster = f"{1 / _time_ratio(best):.2f} times as fast as the classical model{spread}"
    click.echo(f"BEST: {best['label']}, error {percent(best['error'])}, {faster}")
    if found["output"]:
        place, is_recipe = quote(found["output"]), found["output"].lower().endswith((".yaml", ".yml"))
        following = f"qexport convert MODEL -o DIR --config {place}" if is_recipe else f"qexport validate {place}"
        click.echo(f"written to {found['output']}; next: {following}")
    else:
        click.echo("keep it with -o DIR (a bundle) or -o recipe.yaml")


def _time_ratio(candidate: dict) -> float | None:
    """The figure that `median_ci95` is the interval of; None where the recipe was not timed."""
    return candidate["ratio"] and candidate["ratio"]["of_rounds"]["p50"]


def _candidate_row(candidate: dict, best: bool) -> tuple[str, ...]:
    ratio, interval = _time_ratio(candidate), (candidate["ratio"] or {}).get("median_ci95")
    return (
        candidate["label"],
        percent(candidate["error"]),
        f"{candidate['latency_ms']:.2f} ms" if candidate["latency_ms"] else "",
        f"{ratio:.2f} x" if ratio else "",
        f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else "",
        "best" if best else "" if candidate["within"] else "over the limit",
    )


def _show_sites(found: dict, verbose: bool) -> None:
    """The settings of the best recipe: site by site, or the groups of like sites."""
    if verbose:
        rows = [
            (site_label(site), setting_text(one["setting"]), percent(one["relative_error"]), f"{one['time_us']:.0f}")
            for site in found["sites"]
            for one in site["measured"]
        ]
        table("Every setting, measured alone", ("site", "setting", "own error", "µs"), rows, text_columns=2)
    counts = Counter(setting_text(site["setting"]) for site in found["sites"])
    for setting, count in counts.most_common():
        names = [site_label(site) for site in found["sites"] if setting_text(site["setting"]) == setting]
        click.echo(f"  {count} x {setting}: {names[0]}" + (f" ... {names[-1]}" if count > 1 else ""))
