"""compress: the same model in a smaller file, at a loss that is asked for and measured.

1. Run the data through the model once: what the inputs of every weight look like (`calibration`).
2. Measure for each weight what every form takes and costs, and give each its form (`search`, docs/compression.md).
3. Optionally heal the chosen forms: a short distillation in torch (`heal`).
4. Write the file, run it on data that nothing was fitted to, and time it against the original.
"""

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from qexport import installed, profiling, runtime
from qexport._swap import check_writable
from qexport.arguments import as_path
from qexport.bundle import Bundle
from qexport.bundle_writer import check_output, write_bundle
from qexport.compression.checkpoint import Checkpoint, digest
from qexport.compression.job import Job
from qexport.compression.model import named_as, open_model
from qexport.compression.settings import resolve
from qexport.data import load_inputs
from qexport.documents import finite, make_document
from qexport.errors import QexportError, UsageError
from qexport.feeds import Inputs
from qexport.manifest import package_version
from qexport.metrics import choose_metric
from qexport.progress import listener, portion

# Every so manieth batch judges what the others were fitted to.
JUDGING = 4
PROFILE_RUNS = 30


@dataclass
class CompressionReport:
    """What `compress` did. The attributes are the keys of its JSON, which docs/json_schema.md describes; the chief ones:

    Attributes:
        passed: the ratio or the loss that was asked for is reached.
        reasons: why not, in words.
        size: bytes of the classical model's file and of the compressed one, and their `ratio`.
        metric: its `name`, `output`, the figures of both models and the `loss`, on data that nothing was fitted to.
        outputs: relative Frobenius error of every output on that data.
        layers: one dict per weight: its form, its bytes before and after, the relative error of its own outputs as it was
            written.
        profile: the report of `qexport.profile` of both models, None when it was not asked for.
    """

    path: str
    passed: bool
    reasons: list[str]
    notes: list[str]
    settings: dict
    data: dict
    size: dict
    metric: dict
    outputs: dict
    layers: list[dict]
    trials: list[dict]
    seconds: float
    profile: dict | None = None
    versions: dict = field(default_factory=dict)

    def to_dict(self) -> dict:
        """The report as plain data; figures that are not finite are None."""
        return make_document("compress", self.__dict__)


def compress(
    model,
    output,
    data=None,
    *,
    ratio: float | None = None,
    max_drop: float | None = None,
    methods=None,
    products: str | None = None,
    heal: int | None = None,
    recipe=None,
    metric: str | None = None,
    batch: int | None = None,
    seq: int | None = None,
    opset: int | None = None,
    task: str | None = None,
    findings=None,
    profile: bool = True,
    progress=None,
) -> CompressionReport:
    """Write a bundle whose model is the given one with smaller weights.

    Args:
        model: a bundle, whose attention stays as it is; or anything that `qexport.convert` takes, whose attention stays
            classical unless the recipe says how to sample it.
        output: folder of the new bundle, not that of `model`. What a run that was stopped had found lies beside it until one
            is finished, as a note of the exception says.
        data: inputs that weights are fitted to and judged on, every fourth batch of them: .npz or .txt file, a dict of
            arrays or a list of texts; the stored samples when None.
        ratio: bytes of the classical model's file over those of the compressed one.
        max_drop: largest loss of the metric, 0.01 for 1 %; the smallest file within it is looked for. 0.01 when neither is
            given.
        methods: those that may be used, of fp16, int8, trellis, int4, low-rank and mpo; all when None.
        products: what products with weights are computed in: "float", or "int8" where the model bears it: inputs are rounded
            to 8 bits as the model runs, which makes it faster on CPUs and loses half of what may be lost, `max_drop` or
            0.01, at most. `ratio` and `max_drop` may then both be given. "float" when None.
        heal: steps of distillation, for torch models; none when None.
        recipe: a `qexport.recipe.Recipe`, a dict or the path of a YAML file; its key `compress` may hold ratio, max_drop,
            methods, products, heal and layers.
        metric: perplexity, top1 or cosine; what fits the model when None.
        batch, seq: items per run and length that texts are cut to; see `qexport.data.load_inputs`.
        opset, task: of the exported model, see `qexport.convert`; not for bundles.
        findings: folder where what was found is kept, so that other ratios of the same model, data and methods need not find
            it again; beside the output, and removed when done, when None.
        profile: also measure latency and memory of both models.
        progress: called with the step in words and the share that is done, 0 to 1.

    Returns:
        What was done. Where the ratio cannot be reached, the nearest that can is written, and `passed` is false.

    Raises:
        UsageError: a wrong argument or recipe.
        QexportError: the model, the data or the runtime is at fault, nothing can be compressed, or the loss is above
            `max_drop` before any weight is touched or with the most accurate forms.
    """
    started, say = time.monotonic(), listener(progress)
    sampling, settings = resolve(recipe, ratio=ratio, max_drop=max_drop, methods=methods, products=products, heal=heal)
    check_output(output, source=model.path if isinstance(model, Bundle) else str(model))
    if findings is not None:
        findings = as_path("findings", findings)
        if findings.is_file():
            raise QexportError(f"{findings}: a file is there, findings need a folder; choose another place")
        check_writable(findings / "finding")
    # what was found outlives a bundle that cannot be written, so that its context is the last to end
    with ExitStack() as last, write_bundle(output) as writer, named_as(model, writer.path):
        bundle, source, notes = open_model(model, writer.path, sampling, opset, task, portion(say, 0.0, 0.01))
        if settings.heal and (source is None or source.runnable is None):
            raise UsageError(
                f"{model}: heal needs a torch model to train; give the folder or the callable that it came from"
            )
        if settings.heal and "trellis" in settings.methods:
            notes.append("healing has no hold on strings: trellis is left out; without healing it may lose less")
            settings = settings.without("trellis")
        inputs = load_inputs(bundle, data, batch=batch, seq=seq)
        if data is None:
            notes.append(f"{inputs.source} tell too little for low-rank factors, and little about the loss: give --data")
            settings = settings.without("low-rank")
        fitted, judging = _split(inputs, notes)
        classical = runtime.session(bundle.classical_path, library=False)
        chosen = choose_metric(bundle, inputs, classical, metric)
        job = Job(bundle, settings, chosen, fitted, judging, classical, source)
        key = job.key()
        folder = _beside(Path(output)) if findings is None else findings / digest(key)
        store = last.enter_context(Checkpoint(folder, key, lasting=findings is not None))
        if store.resumed:
            notes.append("took up what another run had found")
        result = job.run(store, say)
        figures = {"name": chosen.name, "output": chosen.output, **result.measured.__dict__}
        oldest = max(installed.version_tuple(bundle.manifest["min_onnxruntime"]), result.oldest_runtime)
        writer.manifest = bundle.manifest | {
            "min_onnxruntime": ".".join(map(str, oldest)),
            "compression": finite(
                {
                    "settings": settings.model_dump(mode="json", exclude_none=True),
                    "of_bundle": source is None,
                    "data": {"source": inputs.source, "batch": batch, "seq": seq},
                    "size": result.size,
                    "metric": figures,
                    "output_errors": {name: entry["relative_error"] for name, entry in result.outputs.items()},
                    "layers": [
                        {key: layer[key] for key in ("name", "module", "method", "int8_products")} for layer in result.layers
                    ],
                }
            ),
        }
        measured = None
        if profile:
            say("timing both models", 0.95)
            found = profiling.profile(bundle, seq=min(128, _longest(bundle)), runs=PROFILE_RUNS)
            measured = found.to_dict() | {"bundle": str(output)}
        say("writing the bundle", 0.99)
    return CompressionReport(
        path=str(output),
        passed=not result.reasons,
        reasons=result.reasons,
        notes=notes + result.notes,
        settings=settings.model_dump(mode="json", exclude_none=True),
        data={"source": inputs.source, "fitted": fitted.samples, "judged": judging.samples, "notes": inputs.notes},
        size=result.size,
        metric=figures,
        outputs=result.outputs,
        layers=result.layers,
        trials=result.trials,
        profile=measured,
        seconds=time.monotonic() - started,
        versions={"qexport": package_version("qexport"), "onnxruntime": installed.onnxruntime().__version__},
    )


def _split(inputs: Inputs, notes: list[str]) -> tuple[Inputs, Inputs]:
    """What weights are fitted to, and what they are judged on: the same where there is one batch."""
    if len(inputs.feeds) == 1:
        notes.append("judged on what the weights were fitted to, as there is one batch only: the loss will look too small")
        return inputs, inputs
    judged = [i for i in range(len(inputs.feeds)) if i % JUDGING == JUDGING - 1] or [len(inputs.feeds) - 1]
    parts = [[f for i, f in enumerate(inputs.feeds) if (i in judged) == which] for which in (False, True)]
    return tuple(Inputs(part, inputs.source, inputs.notes) for part in parts)


def _beside(output: Path) -> Path:
    """Where findings are kept until the bundle is written."""
    target = Path(os.path.realpath(output))
    return target.parent / f".{target.name}.compress"


def _longest(bundle: Bundle) -> int:
    return min(bundle.manifest["limits"].values(), default=128)
