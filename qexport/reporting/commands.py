"""The exact commands that make a bundle and the figures of its report again."""

import io
import re
import shlex

from qexport.kv_cache import OPSET as CACHE_OPSET
from qexport.manifest import OPSET
from qexport.providers import option_words
from qexport.reporting.parts import MEASURED, lengths


def making(part: str, report: dict, manifest: dict) -> str:
    """The commands that make a part that a report lacks, where the others were measured."""
    bundle, where = report["bundle"], option_words(report["settings"])
    if part == "samples":  # no command makes it alone
        return _command("report", bundle, "-o", "report.html", *where)
    words = {
        "validate": ("validate", bundle),
        "profile": ("profile", bundle, "--seq", ",".join(map(str, lengths(manifest)))),
        "scaling": ("scaling",),
    }[part]
    file = f"{part}.json"
    reuse = _command("report", bundle, "-o", "report.html", "--reuse", file)
    return f"{_command(*words, *where, '--json')} > {file}\n{reuse}"


def recipe_yaml(manifest: dict) -> str:
    """The recipe of a bundle as `--config` takes it."""
    from ruamel import yaml

    recipe, compression = dict(manifest["recipe"] or {}), manifest.get("compression")
    if compression and "compress" not in recipe:
        recipe["compress"] = {key: value for key, value in compression["settings"].items() if value}
    text = io.StringIO()
    writer = yaml.YAML()
    writer.indent(mapping=2, sequence=4, offset=2)
    writer.dump(recipe, text)
    return text.getvalue()


def reproduce(report: dict, manifest: dict) -> str:
    """Everything in the order in which it was made, as a script for a shell."""
    parts, bundle = report["parts"], report["bundle"]
    lines = [f"# {_versions(report, manifest)}"]
    lines += [
        *_made(manifest, bundle),
        f"sha256sum {shlex.quote(bundle + '/model.onnx')}  # {parts['inspect']['sha256']}",
    ]
    if "validate" in parts:
        lines += _validate(parts["validate"], bundle)
    if "profile" in parts:
        lines.append(_profile(parts["profile"], bundle))
    if "scaling" in parts:
        lines.append(_scaling(parts["scaling"]))
    files = [f"{name}.json" for name in ("validate", "profile", "scaling") if name in parts]
    skipped = [word for name in MEASURED if name not in parts for word in ("--skip", name)]
    reused = [word for file in files for word in ("--reuse", file)]
    data = _data(parts["samples"]["data"]) if "samples" in parts else []
    words = [*data, *option_words(report["settings"]), *reused, *skipped]
    lines.append(_command("report", bundle, "-o", report["output"] or "report.html", *words))
    return "\n".join(lines)


def _made(manifest: dict, bundle: str) -> list[str]:
    """What made the bundle: convert, compress, or one after the other."""
    source, compression = manifest.get("source") or {"kind": "model", "name": "MODEL"}, manifest.get("compression")
    lines, model = [f"# {source['kind']}: {source['name']}; the recipe is above"], source["name"]
    cache = manifest.get("kv_cache")
    asked = {
        "--opset": manifest["opset"] if manifest["opset"] != (OPSET if cache is None else CACHE_OPSET) else None,
        "--task": source.get("task"),
        "--dtype": source.get("dtype"),
        "--kv-cache": cache["length"] if cache else None,
    }
    options = [word for option, value in asked.items() if value is not None for word in (option, value)]
    if not compression:
        return [*lines, _command("convert", model, "-o", bundle, "--config", "recipe.yaml", *options)]
    recipe = "recipe.yaml"
    if compression.get("of_bundle"):
        lines.append("# attention.yaml is the recipe without its key `compress`, compress.yaml that key")
        lines.append(_command("convert", model, "-o", "converted", "--config", "attention.yaml", *options))
        model, recipe, options = "converted", "compress.yaml", []
    data = compression.get("data", {"source": "stored samples"})
    for option in ("batch", "seq"):
        options += [f"--{option}", data[option]] if data.get(option) else []
    words = ["compress", model, "-o", bundle, "--config", recipe, *_data(data), "--metric", compression["metric"]["name"]]
    return [*lines, *_inputs(data), _command(*words, *options)]


def _command(*words) -> str:
    return " ".join(["qexport", *(shlex.quote(str(word)) for word in words)])


def _versions(report: dict, manifest: dict) -> str:
    """What the figures were made with, and the bundle."""
    ran = {}
    for name in ("validate", "profile"):
        ran |= report["parts"].get(name, {}).get("versions", {})
    ran = ran or report["versions"]
    measured = ", ".join(f"{name} {version}" for name, version in ran.items())
    written = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    return f"measured with {measured}" + (f"; converted with {written}" if written else "")


def _data(data: dict) -> list[str]:
    """The option that gives the same inputs; none for the stored samples."""
    named = re.fullmatch(r"(?:\d+ texts? of )?(.*\.(?:npz|txt))", data["source"])
    return ["--data", named[1]] if named else []


def _validate(checked: dict, bundle: str) -> list[str]:
    words = ["validate", bundle, *_data(checked["data"])]
    if checked["seeds"]:
        words += ["--seeds", len(checked["seeds"])]
        if (limit := checked["max_error"]["library"]) is not None:
            words += ["--max-error", f"{limit:g}" if limit <= 1 else f"{100 * limit:g}%"]  # a bare 2 could mean 2 %
    words += option_words(checked.get("settings", {}))
    line = _command(*words, "--json") + " > validate.json"
    return [*_inputs(checked["data"]), line]


def _inputs(data: dict) -> list[str]:
    """A remark on inputs that no option names."""
    return [] if data["source"] == "stored samples" or _data(data) else [f"# inputs: {data['source']}"]


def _profile(timed: dict, bundle: str) -> str:
    settings = timed["settings"]
    words = ["profile", bundle, "--batch", ",".join(map(str, dict.fromkeys(size["batch"] for size in timed["sizes"])))]
    lengths = list(dict.fromkeys(size["sequence"] for size in timed["sizes"] if size["sequence"]))
    words += ["--seq", ",".join(map(str, lengths))] if lengths else []
    words += ["--runs", settings["runs"], "--warmup", settings["warmup"]]
    words += ["--threads", settings["threads"]] if settings["threads"] else []
    words += option_words(settings)
    return _command(*words, "--json") + " > profile.json"


def _scaling(swept: dict) -> str:
    settings = swept["settings"]
    words = ["scaling", "--lengths", ",".join(map(str, settings["lengths"])), "--heads", settings["heads"]]
    if settings["inputs"] == "gaussian":
        words += ["--head-size", settings["head_size"]]
    else:
        words += ["--activations", settings["inputs"]]
    words += ["--causal"] if settings["causal"] else []
    words += ["--threads", settings["threads"], "--strategies", ",".join(settings["strategies"]), *option_words(settings)]
    return _command(*words, "--seconds", f"{settings['seconds']:g}", "--json") + " > scaling.json"
