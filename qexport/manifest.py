"""The manifest of a bundle: what was converted, how, and what runs it."""

import datetime
import importlib.metadata
import platform

IR_VERSION = 10
OPSET = 23  # of converted models, where none is asked for and nothing needs a later one


def make_manifest(source, recipe, sites, left_alone, difference) -> dict:
    """The content of manifest.json.

    Args:
        source: the `qexport.sources.source.Source`, its model rewritten.
        recipe: the recipe that was applied; None where attention stays classical.
        sites, left_alone: what was converted, and what was not and why.
        difference: of the classical model from the source's own outputs; None where it was not measured.
    """
    return {
        "schema_version": 1,
        "qexport_version": package_version("qexport"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": {"kind": source.kind, "name": source.name, "task": source.task, "dtype": source.dtype},
        "recipe": recipe.to_dict() if recipe is not None else {},
        "opset": source.model.opset_imports[""],
        "ir_version": IR_VERSION,
        "min_onnxruntime": min_onnxruntime(
            source.model.opset_imports[""], source.cache is not None, any(site.noise for site in sites)
        ),
        "seed_input": source.model.graph.inputs[-1].name if sites else None,
        "noise": _noise_entry(source.model.graph, sites),
        "sites": [site.to_dict() for site in sites],
        "left_alone": [entry.to_dict() for entry in left_alone],
        "inputs": [spec.to_dict() for spec in source.inputs],
        "limits": source.limits,
        "kv_cache": source.cache.to_dict() if source.cache is not None else None,
        "versions": {
            "python": platform.python_version(),
            **{
                name: package_version(name)
                for name in ("onnx", "onnx-ir", "onnxruntime", "torch", "transformers")
                if package_version(name)
            },
        },
        "metrics": {} if difference is None else {"max_difference_to_source": difference},
    }


def _noise_entry(graph, sites) -> dict | None:
    """manifest["noise"]: the input that levels are multiplied by, and what a run without the op library leaves out."""
    count = sum(site.noise is not None for site in sites)
    if not count:
        return None
    return {"scale_input": graph.inputs[-2].name, "sites": count, "without_library": "no noise, no measurement"}


def min_onnxruntime(opset: int, kv_cache: bool = False, noise: bool = False) -> str:
    """The oldest onnxruntime that runs a bundle's model of this opset, as tests/test_convert_runtimes.py measures it: what
    reads the file, and no older than what the op library loads on, or than what a KV cache or noise's fallback runs on."""
    from qexport.inspection import oldest_runtime
    from qexport.installed import OLDEST, version_tuple
    from qexport.kv_cache import MIN_ONNXRUNTIME as CACHE_RUNTIME
    from qexport.rewrite.measure_attention import MIN_ONNXRUNTIME as NOISE_RUNTIME

    least = CACHE_RUNTIME if kv_cache else NOISE_RUNTIME if noise and opset >= 23 else OLDEST
    return ".".join(map(str, max(version_tuple(oldest_runtime(opset, IR_VERSION)), least)))


def package_version(package: str) -> str | None:
    """The version of an installed package, either build of onnxruntime; None where it is absent."""
    names = ("onnxruntime", "onnxruntime-gpu") if package == "onnxruntime" else (package,)
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "0+unknown" if package == "qexport" else None
