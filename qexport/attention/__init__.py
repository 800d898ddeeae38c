"""map_attention: what the attention of a bundle looks at, in the classical model and in the sampled one.

Per site and head: the attention as a map of queries x keys, its entropy H, the effective support exp(H), and how far
sampling moves both the head's output and, behind earlier layers, the attention itself; as arrays, pictures and an HTML page.
"""

import tempfile
from pathlib import Path

from qexport._swap import check_writable
from qexport.arguments import as_path, as_seed, wholes
from qexport.attention.maps import MEASURES, AttentionMaps, SiteMap, entropy, site_labels
from qexport.bundle import Bundle
from qexport.errors import QexportError, UsageError
from qexport.progress import listener, portion
from qexport.providers import recorded

__all__ = ["MEASURES", "AttentionMaps", "SiteMap", "entropy", "map_attention", "site_labels"]

PAGE = "attention.html"
# Input items that are drawn: each is a picture per layer.
MOST_DRAWN = 16


def map_attention(
    bundle,
    data=None,
    *,
    output=None,
    pictures: bool = True,
    layers=None,
    heads=None,
    seed: int = 0,
    seq: int | None = None,
    library=True,
    providers=None,
    allow_fallback=False,
    progress=None,
) -> AttentionMaps:
    """Map the attention of a bundle's classical and sampled model on some inputs.

    Args:
        bundle: a folder, or a `Bundle`.
        data: a list of texts, a .npz or .txt file, or a dict of arrays; the bundle's stored samples when None.
        output: folder for the page and the pictures; nothing is written when None. Files of the same names are replaced.
        pictures: write PNG files beside the page, which needs matplotlib.
        layers: numbers of the attentions (`layer` in the manifest), all when None.
        heads: numbers of the query heads, all when None.
        seed: of the sampled model, which runs once. `validate` has errors over several seeds.
        seq: sequence length that texts are cut to; without data, the length of generated inputs.
        library: True or a path of an op library: the probabilities come from it.
        providers, allow_fallback: where both models run, as in `qexport.session`; the CPU when None.
        progress: called with the step in words and the share that is done, 0 to 1.

    Raises:
        UsageError: a layer, head or `seq` that is not there, a file in the place of `output`, or `providers` as in
            `qexport.session`.
        QexportError: the bundle, the data, the runtime or its providers are at fault, the maps are larger than
            `sizes.MEMORY_LIMIT`, matplotlib is missing, or `output` cannot be written.
    """
    from qexport import __version__
    from qexport.attention.capture import capture
    from qexport.data import load_inputs
    from qexport.installed import onnxruntime

    say = listener(progress)
    if not library:
        raise UsageError("library must be True or a path: attention maps come from the op library")
    seed = as_seed(seed)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    layers = None if layers is None else sorted(set(wholes("layers", layers, 0)))
    heads = None if heads is None else sorted(set(wholes("heads", heads, 0)))
    if output is not None:
        output = as_path("output", output)
        _check_output(output, pictures)
    inputs = load_inputs(opened, data, batch=None if data is None else 1, seq=seq)
    if output is not None and inputs.samples > MOST_DRAWN:
        raise QexportError(f"{inputs.samples} inputs are given, at most {MOST_DRAWN} are drawn; give fewer")
    options = {"layers": layers, "heads": heads, "seed": seed, "library": library}
    where = {"providers": providers, "allow_fallback": allow_fallback}
    tell = portion(say, 0.0, 0.5 if output is not None else 1.0)
    items, unseen = capture(opened, inputs, where=where, progress=tell, **options)
    maps = AttentionMaps(
        bundle=str(opened.path),
        data={"source": inputs.source, "samples": inputs.samples, "notes": inputs.notes},
        seed=seed,
        items=items,
        notes=_notes(items, unseen),
        settings=recorded(**where),
        versions={"qexport": __version__, "onnxruntime": onnxruntime().__version__},
    )
    if output is not None:
        maps.files = _write(maps, output, pictures, portion(say, 0.5, 1.0))
    return maps


def _notes(items: list[list[SiteMap]], unseen: int) -> list[str]:
    notes = []
    if unseen:
        notes.append(f"{unseen} attentions cannot be observed, as they lie in subgraphs, and are left out")
    if all((site.own_error < 1e-5).all() for maps in items for site in maps):
        notes.append("no attention had to sample: both models are equal here; longer inputs show a difference")
    return notes


def _check_output(folder: Path, pictures: bool) -> None:
    """Find out before the models run whether the results can be drawn and written."""
    if pictures:
        from qexport.attention.figures import matplotlib

        matplotlib()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: a file is there already; choose another folder for the maps")
    check_writable(folder / PAGE)


def _write(maps: AttentionMaps, folder: Path, pictures: bool, say) -> list[Path]:
    """The page, and of each item a summary, all maps, and a map and a difference per site; complete or not at all."""
    from qexport.attention.page import page

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".attention-") as scratch:
            say("writing the page", 0.0)
            files = [Path(scratch) / PAGE]
            files[0].write_text(page(maps), encoding="utf-8")
            for number, item in enumerate(maps.items if pictures else []):
                prefix = f"input_{number + 1}_" if len(maps.items) > 1 else ""
                tell = portion(say, number / len(maps.items), (number + 1) / len(maps.items))
                files += _draw(item, Path(scratch), prefix, tell)
            return [file.replace(folder / file.name) for file in files]
    except OSError as error:
        raise QexportError(
            f"{folder}: cannot be written ({error.strerror or error}); choose another folder or free some space"
        ) from error


def _draw(item: list[SiteMap], folder: Path, prefix: str, say) -> list[Path]:
    from qexport.attention import figures

    drawn = {"summary": lambda: figures.plot_summary(item), "all": lambda: figures.plot_all(item)}
    for site in item:
        drawn[f"layer_{site.layer:02}"] = lambda site=site: figures.plot_site(site)
        drawn[f"layer_{site.layer:02}_difference"] = lambda site=site: figures.plot_site(site, "difference")
    files = []
    for number, (name, make) in enumerate(drawn.items()):
        say(f"drawing {prefix}{name}", number / len(drawn))
        files.append(folder / f"{prefix}{name}.png")
        figures.save(make(), files[-1])
    return files
