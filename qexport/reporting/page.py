"""The report as one HTML page that needs nothing else: no network, no other file."""

from importlib import resources
from pathlib import Path

from qexport import __version__
from qexport.profiling import CLASSICAL, CONVERTED
from qexport.providers import CUDA
from qexport.reporting import sections
from qexport.reporting.commands import making, recipe_yaml, reproduce
from qexport.reporting.judgement import limit, worst_output
from qexport.reporting.markup import code, facts, folded, items, paragraph, table, text
from qexport.words import error_text, megabytes, percent, plural, recipe_text, site_label

# The verdict's word and its sign: colour is not all that tells them apart.
VERDICTS = {True: ("passed", "✓"), False: ("failed", "✕"), None: ("not checked", "?")}
# Sections with measurements: id, title, the part that they show and the function that does.
MEASUREMENTS = (
    ("accuracy", "Accuracy, layer by layer", "validate", sections.accuracy),
    ("samples", "Error against samples", "samples", sections.samples),
    ("latency", "Latency against length", "profile", sections.latency),
    ("ops", "Where the time goes", "profile", sections.ops),
    ("memory", "Memory over time", "profile", sections.memory),
    ("scaling", "Attention alone, against its length", "scaling", sections.scaling),
)


def page(report: dict, manifest: dict) -> str:
    """The HTML document.

    Args:
        report: as `Report.to_dict()` gives it.
        manifest: of the bundle.
    """
    parts = report["parts"]
    content = [
        (anchor, title, show(parts[part]) if part in parts else _missing(part, report, manifest))
        for anchor, title, part, show in MEASUREMENTS
    ]
    content += [
        ("size", "Size", sections.size(parts["inspect"], manifest)),
        ("environment", "Environment", _environment(parts)),
        ("recipe", "Recipe", _recipe(manifest, parts["inspect"])),
        ("reproduce", "How to reproduce", _reproduce(report, manifest)),
    ]
    filled = {
        "TITLE": text(f"{Path(report['bundle']).name}: qexport report"),
        "STYLE": _file("page.css"),
        "SCRIPT": _file("page.js"),
        "HERO": _hero(report, manifest),
        "CONTENTS": "".join(f'<li><a href="#{anchor}">{text(title)}</a></li>' for anchor, title, _ in content),
        "SECTIONS": "".join(
            f'<section id="{anchor}"><h2>{text(title)}</h2>{body}</section>' for anchor, title, body in content
        ),
        "FOOT": paragraph(f"Made {report['created']} by qexport {__version__} from {report['bundle']}."),
    }
    # one pass, so that nothing in the data is taken for a place to fill
    before, *places = _file("page.html").split("{{")
    return before + "".join(filled[name] + rest for name, rest in (place.split("}}", 1) for place in places))


def _file(name: str) -> str:
    return resources.files("qexport.reporting").joinpath(name).read_text("utf-8")


def _about(manifest: dict) -> str:
    """What was converted, in a line."""
    source, sites = manifest.get("source"), manifest["sites"]
    recipes = list(dict.fromkeys(recipe_text(**site) for site in sites))
    computed = recipes[0] if len(recipes) == 1 else f"{len(recipes)} recipes"
    words = [f"{source['kind']}: {source['name']}"] if source else []
    found = len(sites) + len(manifest["left_alone"])
    words.append(f"{len(sites)} of {plural(found, 'attention')} converted ({computed})" if sites else "classical attention")
    if compression := manifest.get("compression"):
        words.append(f"weights in a file {compression['size']['ratio']:.2f} times smaller")
    return ", ".join(words)


def _hero(report: dict, manifest: dict) -> str:
    """The verdict, why, and the chief figures."""
    word, sign = VERDICTS[report["passed"]]
    badge = f'<p class="badge {word.replace(" ", "-")}"><span aria-hidden="true">{sign}</span> {word.capitalize()}</p>'
    shown = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(figure)}</dd><dd>{text(against)}</dd></div>"
        for name, figure, against in _tiles(report, manifest)
    )
    name = Path(report["bundle"]).resolve().name
    return (
        f"<h1>{text(name)}</h1>{paragraph(_about(manifest), 'about')}{badge}{paragraph(report['headline'], 'headline')}"
        f"{items(report['reasons'], 'reasons')}<dl class='tiles'>{shown}</dl>{items(report['notes'], 'notes')}"
    )


def _tiles(report: dict, manifest: dict) -> list[tuple[str, str, str]]:
    """The chief figures: (name, figure, what it is held against)."""
    parts, found = report["parts"], []
    if "validate" in parts:
        name, metrics = worst_output(parts["validate"])
        most = limit(parts["validate"])
        found.append(("Error", error_text(metrics), f"{name}, limit {'none' if most is None else percent(most)}"))
    if "profile" in parts:
        last = parts["profile"]["sizes"][-1]
        models, length = last["models"], f", length {last['sequence']}" if last["sequence"] else ""
        p50 = {which: f"{model['latency_ms']['p50']:.3g} ms" for which, model in models.items()}
        against = f"{p50[CONVERTED]}, classical {p50[CLASSICAL]}{length}"
        found.append(("Time against classical", f"{last['ratio']['of_rounds']['p50']:.2f} ×", against))
        peaks = {which: (model["memory"] or {}).get("peak_bytes") for which, model in models.items()}
        if all(peaks.values()):
            where = "host memory" if parts["profile"]["settings"]["providers"][0] == CUDA else "memory"
            found.append((f"Peak {where}", megabytes(peaks[CONVERTED]), f"classical {megabytes(peaks[CLASSICAL])}"))
    classical = manifest["files"].get("classical.onnx", {}).get("bytes")
    against = f"classical {megabytes(classical)}" if classical else ""
    return [*found, ("Model file", megabytes(parts["inspect"]["file_bytes"]), against)]


def _missing(part: str, report: dict, manifest: dict) -> str:
    """What to do about a section without data."""
    why = report["missing"][part]
    return paragraph(f"No data: {why}. This makes it:", "missing") + code(making(part, report, manifest))


def _environment(parts: dict) -> str:
    """Where it was measured, and what is installed where the page was made."""
    measured = next((parts[name] for name in ("profile", "scaling") if name in parts), {})
    machine, versions = measured.get("machine", {}), {}
    for name in ("validate", "profile", "scaling"):
        versions |= parts.get(name, {}).get("versions", {})
    about = facts(
        {
            "processor": machine.get("processor"),
            "logical CPUs": machine.get("cpu_count"),
            "system": machine.get("platform"),
            "providers": ", ".join(measured.get("settings", {}).get("providers", [])),
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        }
    )
    rows = [(f["subject"], f["state"], f["found"] + (f"; {f['mend']}" if f["mend"] else "")) for f in parts["doctor"]]
    installed = table(("what", "state", "found"), rows, text_columns=3, caption="Where this page was made (qexport doctor)")
    return (about if versions or machine else "") + installed


def _recipe(manifest: dict, found: dict) -> str:
    """The recipe, and what became of every attention."""
    recipe = recipe_yaml(manifest)
    rows = [(site_label(s), recipe_text(**s), s["q_heads"] or "", s["head_size"] or "") for s in manifest["sites"]]
    sites = table(("attention", "computed by", "heads", "head size"), rows, text_columns=2) if rows else ""
    left = [f"{site_label(site)} was left alone: {site['reason']}" for site in manifest["left_alone"]]
    about = facts(
        {
            "opset": ", ".join(f"{domain} {version}" for domain, version in found["opsets"].items()),
            "runs in": f"onnxruntime {found['min_onnxruntime']} and newer" if found["min_onnxruntime"] else "",
            "without the library": "; ".join(f"{op.split(':')[-1]}: {said}" for op, said in found["fallbacks"].items()),
            "noise": (manifest.get("noise") or {}).get("without_library"),
        }
    )
    listed = folded(f"All {len(rows)} attentions", sites) if len(rows) > 12 else sites
    return (
        paragraph("recipe.yaml, what is not named has its default:") + code(recipe) + about + listed + items(left, "notes")
    )


def _reproduce(report: dict, manifest: dict) -> str:
    return paragraph("In a shell, with the versions named and the recipe as recipe.yaml:") + code(
        reproduce(report, manifest)
    )
