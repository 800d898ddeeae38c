"""What tuning leaves behind: a recipe in YAML, or a bundle with it."""

import datetime
import io
import shutil
from collections import Counter
from pathlib import Path

from qexport._swap import whole_file
from qexport.bundle import MANIFEST, MODEL, Bundle
from qexport.bundle_writer import write_bundle
from qexport.errors import QexportError
from qexport.recipe import SAMPLING, make_recipe
from qexport.tuning.settings import Setting
from qexport.tuning.trials import with_settings

SUFFIXES = (".yaml", ".yml")
# Of files that somebody may expect here. A folder with one of them is no place for a bundle; v1.2 is.
OTHER_FILES = (".json", ".toml", ".txt", ".md", ".html", ".htm", ".csv", ".onnx", ".pt2", ".npz", ".zip", ".log")


def recipe_of(bundle: Bundle, sites: list[dict], settings) -> dict:
    """The recipe, as plain data, that gives each site its setting: the commonest one on top, the others by layer. Sites of
    the bundle that are not among `sites` keep what its recipe says.
    """
    seed = bundle.manifest.get("recipe", {}).get("seed", 0)
    if len(sites) < len(bundle.manifest["sites"]):
        recipe = {key: value for key, value in bundle.manifest["recipe"].items() if key != "layers"}
        recipe["layers"], common = list(bundle.manifest["recipe"].get("layers", [])), None
    else:
        common = Counter(settings).most_common(1)[0][0]
        recipe = {**common.named(), "seed": seed, "layers": []}
    modules = Counter(site["module"] for site in bundle.manifest["sites"])
    for site, setting in zip(sites, settings, strict=True):
        if setting != common:
            match = site["module"] if site["module"] and modules[site["module"]] == 1 else site["name"]
            recipe["layers"].append({"match": _literal(match), **setting.named()})
    if not recipe["layers"]:
        del recipe["layers"]
    make_recipe(recipe)
    return recipe


def _literal(name: str) -> str:
    """A glob that fits `name` alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def write(output, bundle: Bundle, sites: list[dict], settings: tuple[Setting, ...], recipe: dict, remark: str) -> None:
    """Write the recipe to a file that ends in .yaml, or a copy of the bundle with it to a folder.

    Raises:
        UsageError: something else than a bundle is at the folder.
        QexportError: the place cannot be written.
    """
    output = Path(output)
    if output.suffix.lower() in SUFFIXES:
        _write_yaml(output, recipe, remark)
    else:
        _write_bundle(output, bundle, sites, settings, recipe)


def _write_yaml(path: Path, recipe: dict, remark: str) -> None:
    from ruamel import yaml

    text = io.StringIO()
    writer = yaml.YAML()
    writer.indent(mapping=2, sequence=4, offset=2)
    writer.dump(recipe, text)
    try:
        with whole_file(path) as file:
            file.write_text(f"# {remark}\n{text.getvalue()}", encoding="utf-8")
    except OSError as error:
        raise QexportError(f"{path}: cannot write the recipe: {error.strerror}") from error


def _write_bundle(output: Path, bundle: Bundle, sites, settings, recipe: dict) -> None:
    """All files of the bundle but for the attributes of its sites."""
    values = {site["name"]: setting.attributes() for site, setting in zip(sites, settings, strict=True)}
    with write_bundle(output) as writer:
        for name in bundle.manifest["files"]:
            if name not in (MODEL, MANIFEST):
                (writer.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.path / name, writer.path / name)
        (writer.path / MODEL).write_bytes(with_settings(bundle, sites, settings).SerializeToString())
        writer.manifest = {
            **bundle.manifest,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "recipe": make_recipe(recipe).to_dict(),
            "sites": [
                site | {key: value for key, value in values.get(site["name"], {}).items() if key in SAMPLING}
                for site in bundle.manifest["sites"]
            ],
        }
