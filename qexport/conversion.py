"""convert: any transformer -> a bundle with the classical ONNX model and the one whose attention is sampled."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from qexport.arguments import whole
from qexport.documents import make_document
from qexport.errors import QexportError, UsageError
from qexport.manifest import IR_VERSION, OPSET, make_manifest
from qexport.progress import listener, portion

OPSETS = (17, 24)
# protobuf refuses 2 GiB; nodes and names need room beside the weights.
EXTERNAL_ABOVE = 2**31 - 2**26
# Shape inference reads small tensors, and reads them only inside the file.
SMALLEST_EXTERNAL = 1024


@dataclass
class ConversionReport:
    """What `convert` did, or would do with dry_run.

    Attributes:
        path: the bundle's folder; None for a dry run.
        sites: one dict per attention that is sampled, as in the manifest.
        left_alone: one dict per attention that is not, with the reason.
        manifest: the manifest.
        notes: remarks of the front end.
        max_difference: the classical model's largest deviation from the source on the example inputs, relative to the
            largest output; None where the source could not be run.
    """

    path: Path | None
    sites: list[dict]
    left_alone: list[dict]
    manifest: dict
    notes: list[str] = field(default_factory=list)
    max_difference: float | None = None

    def to_dict(self) -> dict:
        """The report as plain data; figures that are not finite are None."""
        return make_document("convert", self.__dict__ | {"path": str(self.path) if self.path else None})


def convert(
    model,
    output,
    *,
    recipe=None,
    strategy: str | None = None,
    num_samples=None,
    control_variate=None,
    precision: str | None = None,
    error_tolerance: float | None = None,
    residual: str | None = None,
    noise: str | None = None,
    shots: int | str | None = None,
    seed: int | None = None,
    opset: int | None = None,
    dtype: str | None = None,
    task: str | None = None,
    kv_cache: int | None = None,
    dry_run: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> ConversionReport:
    """Convert a transformer to a bundle.

    Args:
        model: a Hugging Face folder, `package.module:callable`, a .pt2 or an .onnx file.
        output: folder of the bundle; an existing bundle there is replaced once the new one is complete.
        recipe: a `qexport.recipe.Recipe`, a dict or the path of a YAML file.
        strategy, num_samples, control_variate, precision, error_tolerance, residual, seed: override the recipe's own.
        noise, shots: likewise; attention as a noisy device computes it, such as "depolarizing:0.01", and how often each row
            is measured, "inf" for the noisy probabilities themselves: docs/converting.md.
        opset: of the written models, 23 when None (24 with kv_cache); below 23 the fallback is spelled out in MatMul and
            Softmax, for older runtimes.
        dtype: float32, float16 or bfloat16: export torch models in that type.
        task: of a Hugging Face model; feature-extraction when None (causal-lm with kv_cache).
        kv_cache: give a causal language model a cache of so many tokens that it appends to in place: see
            `qexport.generation`.
        dry_run: do everything but write.
        progress: called with the step in words and the share that is done, 0 to 1.

    Returns:
        What was done, and the manifest of the bundle.

    Raises:
        UsageError: a wrong argument or recipe.
        QexportError: the model cannot be read, exported or converted, has no attention, or the bundle cannot be written.
    """
    from qexport.kv_cache import OPSET as CACHE_OPSET
    from qexport.recipe import make_recipe

    say = listener(progress)
    if kv_cache is not None:
        whole("kv_cache", kv_cache, 2)
    if opset is None:
        opset = OPSET if kv_cache is None else CACHE_OPSET
    if not OPSETS[0] <= whole("opset", opset) <= OPSETS[1]:
        raise UsageError(f"opset must be between {OPSETS[0]} and {OPSETS[1]}, got {opset}")
    if kv_cache is not None and opset < CACHE_OPSET:
        raise UsageError(f"a KV cache needs opset {CACHE_OPSET}, got {opset}; leave opset out")
    resolved = make_recipe(
        recipe,
        where=str(recipe) if isinstance(recipe, (str, Path)) else "recipe",
        strategy=strategy,
        num_samples=num_samples,
        control_variate=control_variate,
        precision=precision,
        error_tolerance=error_tolerance,
        residual=residual,
        noise=noise,
        shots=shots,
        seed=seed,
    )
    if resolved.compress is not None:
        raise UsageError("the recipe says how to compress weights, which takes data: qexport compress MODEL -o DIR --config")
    if kv_cache is not None and resolved.has_noise:
        raise UsageError("noise and kv_cache exclude each other: the register would hold the free room of the cache")
    if output is None and not dry_run:
        raise UsageError("output must be a folder, got None; dry_run=True writes nothing")
    if not dry_run:
        from qexport.bundle_writer import check_output

        check_output(output)

    from qexport.rewrite.sample_attention import sample_attention
    from qexport.sources.opening import open_source

    source = open_source(
        model, opset=opset, dtype=dtype, task=task, positions=kv_cache is not None, say=portion(say, 0.0, 0.5)
    )
    if dry_run:
        say("finding attention", 0.5)
        left_alone = _to_classical(source, opset, kv_cache, resolved)
        sites, more = _rewrite(source, sample_attention, resolved)
        _require_sites(source, sites, [*left_alone, *more])
        return _report(None, source, resolved, sites, [*left_alone, *more], None)
    from qexport.bundle_writer import write_bundle

    with write_bundle(output) as writer:
        report = write_models(writer.path, source, resolved, opset, kv_cache, portion(say, 0.5, 0.95))
        report.path = Path(output)
        writer.manifest = report.manifest
        say("writing the bundle", 0.95)
    return report


def write_models(folder: Path, source, recipe, opset: int, kv_cache: int | None, say) -> ConversionReport:
    """Write both models, the samples, the library and the tokenizer into `folder`; the report with its manifest.

    Args:
        recipe: None leaves attention classical; the converted model then equals the classical one.
    """
    from qexport.conversion_checks import check_fallback, check_library, run_classical
    from qexport.rewrite.part_transposes import part_transposes
    from qexport.rewrite.sample_attention import attach_fallback, sample_attention
    from qexport.rewrite.summarize_cache import summarize_cache

    external = external_name(source.model)
    left_alone = []
    if opset >= 23:  # below, Attention does not exist: the baseline stays as it came
        say("finding attention", 0.0)
        left_alone = _to_classical(source, opset, kv_cache, recipe)
    part_transposes(source.model)
    attach_fallback(source.model)  # of noise that the model brought along
    say("writing the classical model", 0.2)
    classical = folder / "classical.onnx"
    save(source.model, classical, external)
    say("running the classical model", 0.3)
    outputs, difference = run_classical(source, classical)
    say("converting attention", 0.5)
    sites = []
    if recipe is not None:
        if opset < 23:
            left_alone = _to_classical(source, opset, None, recipe)
        sites, more = _rewrite(source, sample_attention, recipe)
        left_alone = [*left_alone, *more]
        _require_sites(source, sites, left_alone)
    if source.cache is not None and source.cache.summaries:
        summarize_cache(source.model, sites, source.cache.summaries)
    attach_fallback(source.model)
    save(source.model, folder / "model.onnx", external)
    if outputs is not None:
        say("checking the fallback", 0.7)
        check_fallback(source, folder / "model.onnx", outputs)
        say("checking the op library", 0.85)
        check_library(source, folder / "model.onnx", outputs)
    write_samples(folder / "test_data_set_0", source.examples, outputs or source.expected)
    _copy_library(folder / "lib")
    if source.tokenizer is not None:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_text(source.tokenizer, encoding="utf-8")
    return _report(folder, source, recipe, sites, left_alone, difference)


def _to_classical(source, opset: int, kv_cache: int | None, recipe) -> list:
    """Bring the source to the classical form, with a KV cache when asked for; the attentions that stay."""
    from qexport.kv_cache import add_cache
    from qexport.rewrite.classical import to_classical

    left_alone = _rewrite(source, to_classical, opset)
    if kv_cache is not None:
        add_cache(source, kv_cache, recipe, left_alone)
    return left_alone


def _rewrite(source, rule: Callable, argument):
    """Apply a rewrite pass to the source's graph; a graph that trips it is an error in one line."""
    try:
        return rule(source.model, argument)
    except QexportError:
        raise
    except Exception as error:
        from qexport.sources.quiet import reason_of

        raise QexportError(f"{source.name}: {rule.__name__} failed ({reason_of(error)}); please report the model") from error


def _require_sites(source, sites: list, left_alone: list) -> None:
    if sites:
        return
    if left_alone:
        first = left_alone[0]
        raise QexportError(
            f"{source.name}: none of its {len(left_alone)} attentions can be converted; {first.name}: {first.reason}"
        )
    raise QexportError(
        f"{source.name}: no attention found; looked for Attention, com.microsoft MultiHeadAttention and Attention, "
        "and Softmax whose result is multiplied with values by MatMul or Einsum"
    )


def external_name(model) -> str | None:
    """Name of the weights file when the model is too large for one protobuf, else None."""
    total = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    return "model.onnx.data" if total > EXTERNAL_ABOVE else None


def save(model, path: Path, external: str | None) -> None:
    """Write a model; with `external`, its weights go to that file once and both models of a bundle share it."""
    import onnx_ir as ir

    model.ir_version = IR_VERSION
    if external is None:
        ir.external_data.load_to_model(model)  # the source's own weights file stays behind
    elif not (path.parent / external).exists():
        ir.external_data.unload_from_model(model, path.parent, external, size_threshold_bytes=SMALLEST_EXTERNAL)
    ir.save(model, path)


def saved_bytes(model) -> int:
    """Bytes of the file that `save` makes of a model whose weights lie in it."""
    import onnx_ir as ir

    model.ir_version = IR_VERSION
    ir.external_data.load_to_model(model)
    return ir.to_proto(model).ByteSize()


def write_samples(folder: Path, feeds: dict, outputs: dict) -> None:
    """The inputs and outputs as input_K.pb and output_K.pb, as onnxruntime_perf_test reads them."""
    import onnx_ir as ir

    folder.mkdir()
    for kind, arrays in (("input", feeds), ("output", outputs)):
        for index, (name, array) in enumerate(arrays.items()):
            proto = ir.to_proto(ir.tensor(array, name=name))
            (folder / f"{kind}_{index}.pb").write_bytes(proto.SerializeToString())


def _copy_library(folder: Path) -> None:
    from qexport.installed import find_library, plugin_path

    library = find_library()
    if library is not None:
        folder.mkdir()
        for file in (library, plugin_path(library)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _report(path, source, recipe, sites, left_alone, difference) -> ConversionReport:
    manifest = make_manifest(source, recipe, sites, left_alone, difference)
    return ConversionReport(path, manifest["sites"], manifest["left_alone"], manifest, source.notes, difference)
