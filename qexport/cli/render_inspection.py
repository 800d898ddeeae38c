"""What `inspect` found, as text for people."""

import re
from collections import Counter

import click

from qexport.cli.text import table
from qexport.words import percent, plural, recipe_text, site_label


def show_inspection(found: dict, verbose: bool) -> None:
    """What `inspect` found: facts line by line, then the attentions."""
    facts = {
        "kind": found["kind"] + (f", from {found['source']['kind']} {found['source']['name']}" if found["source"] else ""),
        "file": f"{found['file_bytes'] / 1e6:.1f} MB"
        # of weights that are packed, the numbers that are stored are bytes
        + ("" if found["compression"] else f", {found['parameters'] / 1e6:.1f} M parameters"),
        "sha256": found["sha256"],
        "opset": ", ".join(f"{domain} {version}" for domain, version in found["opsets"].items()),
        "needs": f"IR {found['ir_version']}, onnxruntime {found['min_onnxruntime']} or newer",
        "inputs": _values_text(found["inputs"]),
        "outputs": _values_text(found["outputs"]),
        "recipe": _asked_for(found["recipe"]),
        "weights": _weights_text(found["compression"]),
        "nodes": f"{found['nodes']}: "
        + ", ".join(f"{count} {op}" for op, count in list(found["ops"].items())[: None if verbose else 8]),
        "fallback": "; ".join(f"{op.split(':')[-1]}: {text}" for op, text in found["fallbacks"].items()),
        "changed": ", ".join(found["changed_files"] or []),
    }
    for key, value in facts.items():
        if value:
            click.echo(f"{key:10}{value}")
    if found["attention"]:
        rows = [(site_label(site), site["op"], recipe_text(**site["attributes"])) for site in found["attention"]]
        table("Attention", ("site", "op", "recipe"), rows, text_columns=3)
    if found["noise"]:
        rows = [(n["name"], n["op"], ", ".join(f"{k} {v}" for k, v in n["attributes"].items())) for n in found["noise"]]
        table("Noise and measurement", ("node", "op", "attributes"), rows if verbose else rows[:6], text_columns=3)
        click.echo("without the op library this model has no noise and no measurement: it is the classical one")
    for site in found["left_alone"] or []:
        click.echo(f"left alone {site_label(site)}: {site['reason']}")


def _asked_for(recipe: dict | None) -> str:
    """What a bundle's recipe says; what becomes of each attention is in the table."""
    if recipe is None:
        return ""
    said = [
        f"{key} {value}"
        for key, value in recipe.items()
        if key not in ("layers", "compress") and (key, value) != ("seed", 0)
    ]
    if recipe.get("layers"):
        said.append(f"{plural(len(recipe['layers']), 'override')} by layer")
    return ", ".join(said) or ("" if recipe.get("compress") else "none given")


def _weights_text(compression: dict | None) -> str:
    """How the weights of a compressed bundle are stored."""
    if compression is None:
        return ""
    stored = Counter(
        re.sub(r" (in blocks|of).*", "", re.sub(r"rank \d+", "low-rank", w["method"])) for w in compression["layers"]
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in stored.most_common())
    size, metric = compression["size"], compression["metric"]
    rounded = sum(w.get("int8_products", False) for w in compression["layers"])
    products = f"; products of {rounded} in int8" if rounded else ""
    return (
        f"{size['ratio']:.2f} x smaller file at a loss of {percent(metric['loss'])} of {metric['name']}: {kinds}{products}"
    )


def _values_text(values: list[dict]) -> str:
    """Inputs or outputs with their types; those that all layers have alike stand once, as past.0..5.key."""
    layers: dict[tuple[str, str], list[str]] = {}
    for value in values:
        text = f" {value['dtype']}{value['shape']}".replace("'", "") + (" (optional)" if value.get("optional") else "")
        match = re.fullmatch(r"(\D+\.)(\d+)(\.\D+)", value["name"])
        before, number, behind = match.groups() if match else (value["name"], "", "")
        layers.setdefault((before, behind + text), []).append(number)
    return ", ".join(f"{before}{_span(numbers)}{behind}" for (before, behind), numbers in layers.items())


def _span(numbers: list[str]) -> str:
    """Numbers of layers: from..to where none is left out."""
    if len(numbers) < 3 or [*map(int, numbers)] != [*range(int(numbers[0]), int(numbers[0]) + len(numbers))]:
        return ",".join(numbers)
    return f"{numbers[0]}..{numbers[-1]}"
