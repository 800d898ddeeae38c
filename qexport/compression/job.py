"""One compression: find the forms, make them better, write the file, and see what it really is."""

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qexport import installed
from qexport.bundle import Bundle, sha256
from qexport.compression.calibration import calibrate
from qexport.compression.checkpoint import Checkpoint, array_digest
from qexport.compression.draft import Draft
from qexport.compression.forms import KEEP, TRELLIS, Form
from qexport.compression.heal import heal
from qexport.compression.layers import SMALLEST, Layer, find_layers
from qexport.compression.products import Rounded
from qexport.compression.refit import refit
from qexport.compression.result import Result, result_of
from qexport.compression.search import Candidate, Search
from qexport.compression.settings import MAX_DROP
from qexport.compression.speed import rounded_products
from qexport.compression.trains import Train
from qexport.compression.trials import Measured, Trials, opened
from qexport.errors import QexportError, UsageError
from qexport.external_data import external_files, file_bytes, load_structure
from qexport.feeds import Inputs
from qexport.metrics import Metric
from qexport.progress import portion
from qexport.recipe_compression import INT8_PRODUCTS, Compression
from qexport.validation.comparison import Remembered

# A file whose loss turns out too large is made again, so often.
ATTEMPTS = 4
# Fitting again takes away about so much of the loss that a search sees.
GAINED = 2.5
# Weights whose file is too large are chosen again, so often: nodes, names and outliers take other bytes than was thought.
FITTINGS = 8
# Every so manieth batch of what is fitted to tells how far errors carry, and whether fitting again helped.
PROBING = 4
# Bytes of weights that are worth the table and the functions that all strings of a file share.
STRINGS_FROM = 2**20
# Of what is stored while it runs; a new number where it comes to mean something else, so that nobody takes up the old.
FORMAT = 3


@dataclass(frozen=True)
class Written:
    """A file that was written: its bytes, the forms in it by the name of the layer, what they were at first, and its figures
    on the judging data."""

    nbytes: int
    forms: dict[str, Form]
    candidate: Candidate
    measured: Measured
    outputs: dict[str, float]
    notes: list[str]


class Job:
    """A bundle and what is to become of it.

    Args:
        fitted, judging: the data that weights are fitted to, and that decides.
        classical: a session of the classical model.
        source: the `qexport.sources.source.Source` that the bundle was just made from; None for one that was there.
    """

    def __init__(
        self, bundle: Bundle, settings: Compression, metric: Metric, fitted: Inputs, judging: Inputs, classical, source
    ):
        self.bundle, self.settings, self.metric, self.source = bundle, settings, metric, source
        self.fitted, self.judging, self.classical = fitted, judging, classical
        self.remembered = Remembered(classical)  # on the judging data
        probed = fitted.feeds[PROBING - 1 :: PROBING] or fitted.feeds
        fitting = [feed for feed in fitted.feeds if not any(feed is other for other in probed)] or fitted.feeds
        self.fitting, self.probing = (Inputs(feeds, fitted.source, fitted.notes) for feeds in (fitting, probed))
        self.library = installed.find_library() is not None
        self.layers = self._layers(ir.load(bundle.model_path))
        if sum(layer.nbytes for layer in self.layers) < STRINGS_FROM:
            self.settings = settings.without(TRELLIS)
        self._check_finite()
        self.before, self.present = file_bytes(bundle.classical_path), file_bytes(bundle.model_path)
        self.rounded: tuple[Rounded, ...] = ()
        self.draft = Draft(bundle)

    def key(self) -> dict:
        """What the findings depend on."""
        return {
            "model": sha256(self.bundle.model_path),
            "classical": sha256(self.bundle.classical_path),
            "weights": {name: sha256(self.bundle.path / name) for name in sorted(self._external_files())},
            "metric": self.metric.name,
            "methods": {layer.name: self._methods(layer) for layer in self.layers},
            "data": [
                {name: array_digest(array) for name, array in feed.items()}
                for feed in (*self.fitted.feeds, *self.judging.feeds)
            ],
            "onnxruntime": installed.onnxruntime().__version__,
            "format": FORMAT,
        }

    def _external_files(self) -> set[str]:
        """Names of the files beside both models that their weights lie in."""
        models = self.bundle.model_path, self.bundle.classical_path
        return {name for path in models for name in external_files(load_structure(path))}

    def run(self, store: Checkpoint, say) -> Result:
        """Compress the bundle's model in place.

        Args:
            say: called with the step in words and the share that is done.

        Raises:
            QexportError: the model does not run, or its loss is above the limit before any weight is touched; then nothing
                is stored.
        """
        with ExitStack() as sessions:
            session = sessions.enter_context(opened(self.bundle, self.layers, self.library))
            say("running the model as it is", 0.01)
            probing, judging = (
                Trials(self.bundle, session, classical, self.metric, inputs.feeds)
                for inputs, classical in ((self.probing, Remembered(self.classical)), (self.judging, self.remembered))
            )
            self._check_start(probing, judging)
            calibrate(self.bundle, self.layers, self.fitting, self.library, store, portion(say, 0.02, 0.1))
            trials = [probing, probing, judging]
            if self.settings.products == INT8_PRODUCTS:
                self._round_products(probing, judging, store, portion(say, 0.1, 0.2))
                session = sessions.enter_context(opened(self.bundle, self.layers, self.library, rounded=self.rounded))
                trials[1:] = probing.of(session), judging.of(session)
            search = Search(self.layers, self._methods, *trials, store, portion(say, 0.2, 0.7), self.rounded)
            search.prepare()
            make = self._by_ratio if self.settings.ratio is not None else self._by_drop
            written, reasons = make(search, store, portion(say, 0.7, 0.95))
        result = result_of(self, search, written, reasons)
        self.draft.take_place(self.judging.feeds[0], self.classical)
        return result

    def _round_products(self, probing: Trials, judging: Trials, store: Checkpoint, say) -> None:
        """Tell which products are of whole numbers from here on."""
        most = self.settings.max_drop or MAX_DROP
        self.rounded = rounded_products(self.bundle, self.layers, probing, judging, most, self.library, store, say)
        self.draft = Draft(self.bundle, self.rounded)
        self.present = self.draft.size({})

    def _check_start(self, probing: Trials, judging: Trials) -> None:
        """What is wrong with the data, or lost already, shows before the long part."""
        probing.measure({})
        lost, most = judging.measure({}).loss, self.settings.max_drop
        if most is not None and not lost <= most:
            raise QexportError(
                f"{self.metric.name} loses {lost:.2g} with all weights as they were, above max_drop {most:g}; allow "
                "more, or sample attention less coarsely"
            )

    def _by_ratio(self, search: Search, store: Checkpoint, say) -> tuple[Written, list[str]]:
        """The least loss in a file of so many bytes; the nearest where that cannot be had, and why."""
        target = self.before / self.settings.ratio
        rest = self.present - sum(layer.nbytes for layer in self.layers)
        budget = target - rest
        for attempt in range(1, FITTINGS + 1):
            candidate = search.within(budget if attempt < FITTINGS else 0)
            least = attempt == FITTINGS or candidate.nbytes > budget
            size = self.draft.size(self._forms(search, candidate))
            if size <= target or least:
                forms, notes = self._improve(search, candidate, store, say)
                size = self.draft.size(forms)
            if size <= target or least:
                break
            budget = target - (size - candidate.nbytes)
        written = self._write(candidate, forms, notes, say)
        reasons = []
        loss, most = written.measured.loss, self.settings.max_drop
        if most is not None and not loss <= most:
            reasons.append(
                f"{self.metric.name} loses {loss:.3g} in the file, above max_drop {most:g}; ask for a smaller ratio"
            )
        if written.nbytes <= target:
            return written, reasons
        return written, [
            *reasons,
            f"a ratio of {self.settings.ratio:g} cannot be reached: that is a file of {_megabytes(target)}, the weights "
            f"take {_megabytes(search.smallest())} at least, and {_megabytes(rest)} are something else; "
            f"this one has {_megabytes(written.nbytes)}",
        ]

    def _by_drop(self, search: Search, store: Checkpoint, say) -> tuple[Written, list[str]]:
        """The smallest file whose loss, measured on the file itself, is within the limit; the last tried where none is, and
        why."""
        most = self.settings.max_drop
        limit, written = GAINED * most, None
        for _ in range(ATTEMPTS):
            candidate = search.within_loss(limit)
            if candidate is None and written:
                break
            if candidate is None:
                raise QexportError(
                    f"{self.metric.name} loses {search.candidates[0].measured.loss:.2g} even in the most accurate forms, "
                    f"above max_drop {most:g}; allow more, or give data whose batches are like each other"
                )
            written = self._write(candidate, *self._improve(search, candidate, store, say), say)
            if written.measured.loss <= most:
                return written, []
            # below what this one lost in its trial, lest it be found again
            limit = min(limit, candidate.measured.loss) * 0.8 * most / written.measured.loss
        loss = written.measured.loss
        return written, [f"{self.metric.name} loses {loss:.3g} in the file, above max_drop {most:g}; ask for less"]

    def _write(self, candidate: Candidate, forms: dict[str, Form], notes: list[str], say) -> Written:
        """Write the file of what a candidate has become, and judge it."""
        size = self.draft.write(forms)
        say("running the compressed file", 0.8)
        ours = bool(self.bundle.manifest["sites"]) or any(isinstance(form, Train) for form in forms.values())
        measured, outputs = self.draft.judge(self.metric, self.judging, self.remembered, library=self.library and ours)
        return Written(size, forms, candidate, measured, outputs, notes)

    def _improve(self, search: Search, candidate: Candidate, store: Checkpoint, say) -> tuple[dict[str, Form], list[str]]:
        """A candidate's forms with better numbers in them, and what to say of it."""
        chosen = self._forms(search, candidate)
        forms = refit(
            self.bundle,
            self.layers,
            candidate.methods,
            chosen,
            self.fitting.feeds,
            self.library,
            store,
            portion(say, 0.0, 0.5),
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
            say=portion(say, 0.5, 0.8),
        )
        return healed.forms, healed.notes

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

    def _forms(self, search: Search, candidate: Candidate) -> dict[str, Form]:
        chosen = zip(self.layers, candidate.methods, strict=True)
        return {layer.name: search.form(layer, method) for layer, method in chosen if method.kind != KEEP}


def _megabytes(count: float) -> str:
    """Bytes in four digits: a file that misses its ratio by a thousandth shows it."""
    return f"{count / 1e6:.4g} MB"
