"""Which form each weight gets.

Every method's error at a layer's own outputs is known from the layer's inputs; one run per layer and kind of method tells
how far such an error carries to the model's output (its gain). Squared errors at the output add up, and so do bytes, so that
a knapsack (`qexport.knapsack`) gives each weight its method: the whole front of sizes at once. States of that front are then
tried in the model itself.
"""

from dataclasses import dataclass

import numpy as np

from qexport.compression import forms
from qexport.compression.calibration import positions, weights_of
from qexport.compression.checkpoint import Checkpoint
from qexport.compression.forms import HALF, INTEGER, KEEP, LOW_RANK, MPO, TRELLIS, Form, Method, Seen
from qexport.compression.layers import Layer
from qexport.compression.products import Rounded, label_of, names_of
from qexport.compression.trials import Measured, Trials
from qexport.knapsack import Option, State, choose, front, last_within

# A layer that loses more than this share of its outputs' square is broken, whatever the others make of it.
WORST = 0.5
# A layer is probed with the method whose own squared error is nearest to this one, on so many batches.
PROBED_ERROR = 1e-2
PROBE_FEEDS = 2
# Rates of strings whose error is measured: its logarithm falls by about as much with every bit.
MEASURED_RATES = (2.0, 3.0, 5.0)
LEAST = 1e-12
# Weights with more than this share of all bytes are probed with so many methods of a kind.
LARGE, LARGE_PROBES = 0.1, 4
# Low-rank factors keep what the inputs use: with fewer positions per input than this, the next ones use something else.
ENOUGH = 4
# Share of the search's time that the measuring takes, before anything is tried.
PREPARING = 0.8


@dataclass(frozen=True)
class Candidate:
    """A method for each layer, the bytes of the weights, and what the model made of it."""

    methods: tuple[Method, ...]
    nbytes: int
    measured: Measured


class Search:
    """The layers with their options, and the candidates that were tried.

    Args:
        layers: of the model.
        allowed: called with a layer; its methods, of fp16, int8, trellis, int4, low-rank, mpo.
        gains, probing, judging: trials on data that nothing is fitted to: for the gains, on the same data for `error`, and
            for what is tried. Products are of floats where gains are measured, as errors at the outputs add up.
        store: where findings are kept.
        say: called with the step in words and the share that is done.
        rounded: the products that are of whole numbers in `probing` and `judging`; their weights get forms that become a
            matrix.
    """

    def __init__(
        self,
        layers: list[Layer],
        allowed,
        gains: Trials,
        probing: Trials,
        judging: Trials,
        store: Checkpoint,
        say,
        rounded: tuple[Rounded, ...] = (),
    ):
        self.layers, self.allowed, self.store, self.say = layers, allowed, store, say
        self.gains, self.probing, self.judging, self.rounded = gains, probing, judging, rounded
        self.candidates: list[Candidate] = []
        self.unseen: list[Layer] = []  # too few inputs for low-rank factors
        self._forms: dict[tuple[str, Method], Form | None] = {}
        self._seen: Seen | None = None

    def prepare(self) -> None:
        """Measure every option: what it takes and what it costs."""
        self.places = []
        for number, layer in enumerate(self.layers):
            self.say(f"measuring {layer.label}", PREPARING * number / len(self.layers))
            self.places.append(self._options(layer))
        self.states = front(self.places)

    def form(self, layer: Layer, method: Method) -> Form | None:
        """The layer's weight in that form; None for `keep`."""
        key = layer.name, method
        if key not in self._forms:
            self._forms[key] = self.seen(layer).make(method)
        return self._forms[key]

    def seen(self, layer: Layer) -> Seen:
        """The layer with what its inputs look like; the last one is remembered."""
        if self._seen is None or self._seen.layer is not layer:
            self._seen = Seen(layer, weights_of(layer, self.store))
        return self._seen

    def smallest(self) -> int:
        """Bytes of the weights in the smallest forms that break no layer."""
        return sum(min(round(option.cost) for option in options) for options in self.places)

    def within(self, nbytes: int) -> Candidate:
        """The candidate with the least predicted error whose weights take at most so many bytes; the smallest where none
        does."""
        places = [[Option(o.choice, o.load, o.cost) for o in options] for options in self.places]
        return self._try(choose(front(places), places, nbytes))

    def within_loss(self, loss: float) -> Candidate | None:
        """The smallest candidate of the front whose metric loses at most `loss` on the judging data; None where not even the
        most accurate one does."""
        last = last_within(self.states, lambda state: self._try(state).measured.loss <= loss)
        return None if last is None else self._try(last)

    def dense(self, methods) -> dict[str, np.ndarray]:
        """What a runtime makes of the weights in these forms, by the name of the initializer."""
        chosen = zip(self.layers, methods, strict=True)
        return {
            layer.name: layer.as_stored(self.form(layer, method).dense()) for layer, method in chosen if method.kind != KEEP
        }

    def error(self, chosen: dict[str, Form]) -> float:
        """The model's relative error with these forms, by the name of the layer, on the probing data."""
        fed = {layer.name: layer.as_stored(chosen[layer.name].dense()) for layer in self.layers if layer.name in chosen}
        return self.probing.measure(fed).error

    def _try(self, state: State) -> Candidate:
        methods = tuple(option.choice for option in state.options)
        for candidate in self.candidates:
            if candidate.methods == methods:
                return candidate
        nbytes = sum(forms.nbytes(layer, method) for layer, method in zip(self.layers, methods, strict=True))
        tried = len(self.candidates)
        self.say(f"trying weights of {nbytes / 1e6:.2f} MB", PREPARING + (1 - PREPARING) * tried / (tried + 4))
        key = f"trial {' '.join(map(str, methods))}{label_of(self.rounded)}"
        found = self.store.compute(key, lambda: list(self.judging.measure(self.dense(methods)).__dict__.values()))
        self.candidates.append(Candidate(methods, nbytes, Measured(*map(float, found))))
        return self.candidates[-1]

    def _options(self, layer: Layer) -> list[Option]:
        """The methods of a layer as options: bytes under a limit of the squared error at the model's output."""
        allowed, is_rounded = self.allowed(layer), layer.name in names_of(self.rounded)
        few = not layer.is_stack and positions(layer, self.store) < ENOUGH * forms.matrix_shape(layer)[0]
        if LOW_RANK in allowed and few:
            allowed = tuple(method for method in allowed if method != LOW_RANK)
            if not is_rounded:
                self.unseen.append(layer)
        found = forms.methods(layer, allowed)
        kept = self.store.compute(f"errors {layer.name} {' '.join(map(str, found))}", lambda: self._errors(layer, found))
        options = []
        for method, error, gain in zip(found, *kept, strict=True):
            if error <= WORST and not (is_rounded and method.kind in (LOW_RANK, MPO)):
                options.append(Option(method, forms.nbytes(layer, method), float(gain * error)))
        return options

    def _errors(self, layer: Layer, found: list[Method]) -> np.ndarray:
        """(2, methods): the relative squared error of the layer's outputs, and the gain that takes it to the model's. Of
        low-rank factors the error is what the rank leaves out and what their bits cost, which is taken to be what the same
        bits cost the whole weight; of strings it lies on a line through those that are measured."""
        seen, errors, gains = self.seen(layer), np.zeros(len(found)), np.zeros(len(found))
        for i, method in enumerate(found):
            if method.kind in (HALF, INTEGER, MPO) or method.rate in MEASURED_RATES:
                errors[i] = seen.error(seen.make(method))
            elif method.kind == LOW_RANK:
                rounding = [e for m, e in zip(found, errors, strict=True) if (m.kind, m.bits) == (INTEGER, method.bits)]
                errors[i] = seen.spectrum.errors()[method.rank] + min(rounding, default=0.0)
        strings = [i for i, method in enumerate(found) if method.kind == TRELLIS]
        if strings:
            known = [i for i in strings if found[i].rate in MEASURED_RATES]
            slope, level = np.polyfit([found[i].rate for i in known], np.log(np.maximum(errors[known], LEAST)), 1)
            for i in strings:
                errors[i] = errors[i] or np.exp(level + slope * found[i].rate)
        is_large = layer.nbytes > LARGE * sum(other.nbytes for other in self.layers)
        for kinds in ((HALF, INTEGER), (LOW_RANK,), (MPO,), (TRELLIS,)):
            members = sorted((i for i, method in enumerate(found) if method.kind in kinds), key=lambda i: errors[i])
            if not members:
                continue
            if is_large:
                probed = [members[i] for i in sorted({*np.linspace(0, len(members) - 1, LARGE_PROBES).astype(int)})]
            else:
                probed = [min(members, key=lambda i: abs(np.log(max(errors[i], LEAST) / PROBED_ERROR)))]
            reached = [self._gain(seen, seen.make(found[i])) for i in probed]
            at = np.log(np.maximum(errors, LEAST))
            gains[members] = np.interp(at[members], at[probed], reached)
        return np.array([errors, gains])

    def _gain(self, seen: Seen, form: Form) -> float:
        """Squared error of the model's outputs per squared error of this layer's."""
        weights = {seen.layer.name: seen.layer.as_stored(form.dense())}
        reached = self.gains.measure(weights, PROBE_FEEDS).error ** 2
        return reached / max(seen.error(form), np.finfo(float).tiny)
