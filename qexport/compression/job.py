"""One compression: find the forms, heal them, write the file, and see what it really is."""

import shutil
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qexport import conversion, runtime
from qexport.bundle import Bundle, sha256
from qexport.compression import nodes
from qexport.compression.calibration import calibrate
from qexport.compression.checkpoint import Checkpoint, array_digest
from qexport.compression.forms import KEEP, TRELLIS, Form, Method, nbytes
from qexport.compression.heal import heal
from qexport.compression.layers import SMALLEST, Layer, find_layers
from qexport.compression.refit import refit
from qexport.compression.search import Candidate, Search
from qexport.compression.trains import Train
from qexport.compression.trials import Measured, Trials, opened
from qexport.errors import QexportError, UsageError
from qexport.external_data import file_bytes
from qexport.feeds import Inputs
from qexport.metrics import Metric
from qexport.recipe_compression import Compression
from qexport.rewrite.sample_attention import attach_fallback
from qexport.validation.comparison import output_errors

# A file whose loss turns out too large is made again, so often.
ATTEMPTS = 4
# Fitting again takes away about so much of the loss that a search sees.
GAINED = 2.5
# One that is too large itself, so often: nodes and names are some bytes more or less than was thought, of small models only.
FITTINGS = 8
# Every so manieth batch of what is fitted to tells how far errors carry, and whether fitting again helped.
PROBING = 4
DRAFT = "compressed.onnx"
# Bytes of weights that are worth the table and the functions that all strings of a file share.
STRINGS_FROM = 2**20
# Of what is stored while it runs; a new number where it comes to mean something else, so that nobody takes up the old.
FORMAT = 3
SAMPLES = 4


@dataclass
class Result:
    """What a job made: figures of the file that was written, on the judging data, and how it came about."""

    size: dict
    measured: Measured
    outputs: dict
    layers: list[dict]
    trials: list[dict]
    oldest_runtime: tuple[int, ...]
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Job:
    """A bundle and what is to become of it.

    Args:
        fitted, judging: the data that weights are fitted to, and that decides.
        classical: a session of the classical model.
        source: the `qexport.sources.Source` that the bundle was just made from; None for one that was there.
    """

    def __init__(
        self, bundle: Bundle, settings: Compression, metric: Metric, fitted: Inputs, judging: Inputs, classical, source
    ):
        self.bundle, self.settings, self.metric, self.source = bundle, settings, metric, source
        self.fitted, self.judging, self.classical = fitted, judging, classical
        probed = fitted.feeds[PROBING - 1 :: PROBING] or fitted.feeds
        fitting = [feed for feed in fitted.feeds if not any(feed is other for other in probed)] or fitted.feeds
        self.fitting, self.probing = (Inputs(feeds, fitted.source, fitted.notes) for feeds in (fitting, probed))
        self.library = runtime.find_library() is not None
        self.layers = self._layers(ir.load(bundle.model_path))
        if sum(layer.nbytes for layer in self.layers) < STRINGS_FROM:
            self.settings = settings.without(TRELLIS)
        self._check_finite()
        self.before, self.present = file_bytes(bundle.classical_path), file_bytes(bundle.model_path)
        self.draft = bundle.path / DRAFT

    def key(self) -> dict:
        """What the findings depend on."""
        return {
            "model": sha256(self.bundle.model_path),
            "classical": sha256(self.bundle.classical_path),
            "metric": self.metric.name,
            "methods": {layer.name: self._methods(layer) for layer in self.layers},
            "data": [
                {name: array_digest(array) for name, array in feed.items()}
                for feed in (*self.fitted.feeds, *self.judging.feeds)
            ],
            "onnxruntime": runtime.onnxruntime().__version__,
            "format": FORMAT,
        }

    def run(self, store: Checkpoint, say) -> Result:
        """Compress the bundle's model in place.

        Args:
            say: called with the step in words and the share that is done.

        Raises:
            QexportError: the loss is above the limit before any weight is touched, or the model does not run.
        """
        with opened(self.bundle, self.layers, self.library) as session:
            calibrate(
                self.bundle, self.layers, self.fitting, self.library, store, lambda step, done: say(step, 0.02 + 0.08 * done)
            )
            search = Search(
                self.layers,
                self._methods,
                self._trials(session, self.probing),
                self._trials(session, self.judging),
                store,
                lambda step, done: say(step, 0.1 + 0.6 * done),
            )
            search.prepare()
            make = self._by_ratio if self.settings.ratio is not None else self._by_drop
            result = make(search, store, lambda step, done: say(step, 0.7 + 0.25 * done))
        if search.unseen:
            result.notes.append(
                f"{len(search.unseen)} of {len(self.layers)} weights saw too few inputs for low-rank factors: give more data"
            )
        self.draft.replace(self.bundle.model_path)
        self._write_samples()
        return result

    def _write_samples(self) -> None:
        """Samples from the data that judged, where it has items: `validate` then looks at inputs like those."""
        feed = self.judging.feeds[0]
        if len({len(array) if array.ndim else 0 for array in feed.values()}) == 1:
            feed = {name: array[:SAMPLES] for name, array in feed.items()}
            names = [output.name for output in self.classical.get_outputs()]
            outputs = dict(zip(names, runtime.run(self.classical, names, feed), strict=True))
            shutil.rmtree(self.bundle.samples_path)
            conversion.write_samples(self.bundle.samples_path, feed, outputs)

    def _by_ratio(self, search: Search, store: Checkpoint, say) -> Result:
        """The least loss in a file of so many bytes; the nearest where that cannot be had."""
        target = self.before / self.settings.ratio
        rest = self.present - sum(layer.nbytes for layer in self.layers)
        budget, reasons = target - rest, []
        for attempt in range(FITTINGS):
            candidate = search.within(budget if attempt < FITTINGS - 1 else 0)
            chosen = self._forms(search, candidate)
            written = self._write(chosen)
            if written <= target or candidate.nbytes > budget:
                break
            budget = target - (written - candidate.nbytes)
        if written > target:
            reasons.append(
                f"a ratio of {self.settings.ratio:g} cannot be reached: the weights take {search.smallest() / 1e6:.2f} MB "
                f"at least, and {rest / 1e6:.2f} MB are something else; this is {self.before / written:.2f}"
            )
        chosen, notes = self._improve(search, candidate, chosen, store, say)
        self._write(chosen)
        return self._finish(search, candidate, chosen, say, reasons, notes)

    def _by_drop(self, search: Search, store: Checkpoint, say) -> Result:
        """The smallest file whose loss, measured on the file itself, is within the limit."""
        most = self.settings.max_drop
        limit, result = GAINED * most, None
        for _ in range(ATTEMPTS):
            candidate = search.within_loss(limit)
            if candidate is None and result:
                break
            if candidate is None:
                loss = search.candidates[0].measured.loss
                raise QexportError(
                    f"{self.metric.name} loses {loss:.2g} with all weights as they were, above max_drop {most:g}; allow "
                    "more, or sample attention less coarsely"
                )
            chosen, notes = self._improve(search, candidate, self._forms(search, candidate), store, say)
            self._write(chosen)
            result = self._finish(search, candidate, chosen, say, [], notes)
            if result.measured.loss <= most:
                return result
            # below what this one lost in its trial, lest it be found again
            limit = min(limit, candidate.measured.loss) * 0.8 * most / result.measured.loss
        result.reasons.append(
            f"{self.metric.name} loses {result.measured.loss:.3g} in the file, above max_drop {most:g}; ask for less"
        )
        return result

    def _improve(
        self, search: Search, candidate: Candidate, chosen: dict[str, Form], store: Checkpoint, say
    ) -> tuple[dict[str, Form], list[str]]:
        """The same forms with better numbers in them, and what to say of it."""
        forms = refit(
            self.bundle,
            self.layers,
            candidate.methods,
            chosen,
            self.fitting.feeds,
            self.library,
            store,
            lambda step, done: say(step, 0.5 * done),
        )
        if search.error(forms) >= search.error(chosen):
            forms = chosen
        if not self.settings.heal:
            return forms, []
        healed = heal(
            self.source,
            self.layers,
            forms,
            self.fitted.feeds,
            steps=self.settings.heal,
            metric=self.metric,
            store=store,
            say=lambda step, done: say(step, 0.5 + 0.3 * done),
        )
        return healed.forms, healed.notes

    def _finish(
        self, search: Search, candidate: Candidate, chosen: dict[str, Form], say, reasons: list[str], notes: list[str]
    ) -> Result:
        """Measure the file that was written from `chosen`."""
        say("running the compressed file", 0.8)
        ours = any(isinstance(form, Train) for form in chosen.values())
        with_library = self.library and (ours or bool(self.bundle.manifest["sites"]))
        if with_library:  # a stock runtime must take the file, too
            runtime.run(runtime.session(self.draft, library=False), None, self.judging.feeds[0])
        session = runtime.session(self.draft, library=with_library)
        errors = output_errors(self.bundle, self.judging, [0], self.classical, session)
        after = file_bytes(self.draft)
        measured = self._trials(session, self.judging).measure({})
        if not np.isfinite(measured.loss):
            reasons.append(f"{self.metric.name} of the file is {measured.figure} on this data; ask for less")
        return Result(
            size={"before": self.before, "after": after, "ratio": self.before / after},
            measured=measured,
            outputs={name: {"relative_error": float(found.relative_errors()[0])} for name, found in errors.items()},
            layers=[
                self._layer_entry(search, layer, method)
                for layer, method in zip(self.layers, candidate.methods, strict=True)
            ],
            trials=[
                {"bytes": tried.nbytes, "loss": tried.measured.loss, "error": tried.measured.error}
                for tried in search.candidates
            ],
            oldest_runtime=max(
                (nodes.oldest_runtime(layer, chosen[layer.name]) for layer in self.layers if layer.name in chosen),
                default=(),
            ),
            reasons=reasons,
            notes=notes,
        )

    def _layer_entry(self, search: Search, layer: Layer, method: Method) -> dict:
        return {
            "name": layer.name,
            "module": layer.label,
            "kinds": list(layer.kinds),
            "shape": list(layer.shape),
            "method": str(method),
            "before": layer.nbytes,
            "after": nbytes(layer, method),
            "relative_error": search.seen(layer).error(search.form(layer, method)) ** 0.5 if method.kind != KEEP else 0.0,
        }

    def _layers(self, model: ir.Model) -> list[Layer]:
        found = find_layers(model)
        if not found:
            raise QexportError(
                f"{self.bundle.path}: holds no weights to compress: no MatMul, Gemm or Gather reads a constant matrix of "
                f"{SMALLEST} floats or more (a model that is quantised already has none)"
            )
        for index, override in enumerate(self.settings.layers):
            if not any(override.fits(layer.label, layer.name) for layer in found):
                known = ", ".join(layer.label for layer in found[:4])
                raise UsageError(
                    f"compress.layers[{index}].match: {override.match!r} fits no weight; weights are {known}, ..."
                )
        return found

    def _check_finite(self) -> None:
        for layer in self.layers:
            bad = int((~np.isfinite(layer.stored())).sum())
            if bad:
                raise QexportError(f"{self.bundle.path}: weight {layer.name} holds {bad} NaN or infinite values; mend it")

    def _methods(self, layer: Layer) -> tuple[str, ...]:
        return self.settings.methods_of(layer.label, layer.name)

    def _trials(self, session, inputs: Inputs) -> Trials:
        return Trials(self.bundle, session, self.classical, self.metric, inputs.feeds)

    def _forms(self, search: Search, candidate: Candidate) -> dict[str, Form]:
        chosen = zip(self.layers, candidate.methods, strict=True)
        return {layer.name: search.form(layer, method) for layer, method in chosen if method.kind != KEEP}

    def _write(self, chosen: dict[str, Form]) -> int:
        """Write the draft; its bytes."""
        model = ir.load(self.bundle.model_path)
        for layer in self._layers(model):
            if layer.name in chosen:
                nodes.store(model, layer, chosen[layer.name])
        attach_fallback(model)
        weights = self.draft.with_name(DRAFT + ".data")
        weights.unlink(missing_ok=True)  # of the attempt before
        conversion.save(model, self.draft, weights.name if conversion.external_name(model) else None)
        return file_bytes(self.draft)
