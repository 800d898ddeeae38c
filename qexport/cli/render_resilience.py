"""The report of `measure_resilience` as text for people."""

import click

from qexport.cli.text import ran_on, table
from qexport.words import percent, plural, site_label


def show_resilience(report, verbose: bool) -> None:
    """What is lost per level, shots and mitigation, and the level up to which it is within the tolerance."""
    found = report.to_dict()
    settings, metric = found["settings"], found["metric"]
    click.echo(
        f"{found['bundle']} on {found['data']['source']}: {plural(found['data']['samples'], 'item')}, "
        f"{settings['noise']} noise in {plural(found['sites'], 'attention')}, {plural(settings['seeds'], 'seed')}, "
        f"{found['seconds']:.0f} s{ran_on(settings)}"
    )
    for note in found["data"]["notes"] + found["notes"]:
        click.echo(f"note: {note}")
    for site in found["left_alone"]:
        click.echo(f"left alone {site_label(site)}: {site['reason']}")
    header = ("mitigation", "shots", *(f"{level:g}" for level in settings["levels"]))
    tables = {"loss": f"Loss of {metric['name']} (classical: {metric['classical']:.4g}) by the level of noise"}
    tables["attention_error"] = "Relative error of an attention's output, mean"
    if verbose:
        tables |= {"metric": metric["name"], "output_error": f"Relative error of output {metric['output']}"}
    for key, title in tables.items():
        text = _number if key == "metric" else _share
        rows = [
            (*line, *(text(cell[key]) for cell in found["cells"] if (cell["mitigation"], str(cell["shots"])) == line))
            for line in dict.fromkeys((cell["mitigation"], str(cell["shots"])) for cell in found["cells"])
        ]
        table(title, header, rows)
    click.echo(f"How noisy may it be? A loss of {percent(settings['tolerance'])} or less:")
    for line in found["thresholds"]:
        click.echo(f"  {line['mitigation']}, {line['shots']} shots: {_threshold_text(line, settings['levels'])}")


def _threshold_text(line: dict, levels: list[float]) -> str:
    if line["level"] is not None:
        interval = line["level_ci95"]
        return f"up to level {line['level']:.2g}" + (f" ({interval[0]:.2g} to {interval[1]:.2g})" if interval else "")
    if line["verdict"] == "never held":
        return "not even without noise: the shots alone cost more"
    return f"{line['verdict']}: no level up to {levels[-1]:g} costs as much"


def _share(summary: dict) -> str:
    """A mean in percent with the half width of its 95 % interval."""
    mean, interval = summary["mean"], summary["ci95"]
    if mean is None:
        return "not finite"
    return f"{percent(mean)} ± {percent((interval[1] - interval[0]) / 2)}" if interval else percent(mean)


def _number(summary: dict) -> str:
    return "not finite" if summary["mean"] is None else f"{summary['mean']:.5g}"
