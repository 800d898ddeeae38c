"""The torch module of a model with compressed weights in it, learning to give what it gives without them.

Codes are learnt through rounding as if it were not there (the straight-through estimator, Bengio et al. 2013), and scales as
parameters of their own (LSQ, Esser et al., ICLR 2020).
"""

import io
import math

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from qexport.compression.checkpoint import Checkpoint
from qexport.compression.forms import Form
from qexport.compression.layers import LINEAR, TABLE, Layer
from qexport.compression.lowrank import LowRank
from qexport.compression.quantize import Quantized
from qexport.errors import QexportError
from qexport.metrics import COSINE, Metric
from qexport.sources.runnable import as_exported
from qexport.sources.source import Source
from qexport.validation.unpadded import keep_masks, padded_axis

# Share of the steps in which the learning rate rises.
WARMUP = 0.05
CLIP = 1.0
# Steps between two looks at the held-out feeds, each of which is kept.
EVERY = 25
# Feeds are held out to tell the best state: one in so many, but no more than MOST_HELD.
HELD_OUT, MOST_HELD = 16, 4
# Outputs of the original model that are remembered, in bytes.
REMEMBERED = 512 * 2**20


class Distillation:
    """A run: `place` the forms, `train` them, take the best `forms`.

    Attributes:
        before, least: loss on the held-out feeds at first, and of the best step, `best_step`.
    """

    def __init__(self, source: Source, metric: Metric, feeds: list[dict]):
        self.runnable, self.metric, self.feeds = source.runnable, metric, feeds
        self.manifest = {"inputs": [spec.to_dict() for spec in source.inputs]}
        self.original = self.runnable.weights()
        self.parts: dict[str, _Codes | _Factors] = {}
        # (parameter, use) -> (layer, whether the parameter holds the transpose of the form's matrix)
        self.places: dict[tuple[str, str], tuple[str, bool]] = {}
        self.remembered, self.room = {}, REMEMBERED
        order = np.random.default_rng(0).permutation(len(feeds))
        held = min(MOST_HELD, -(-len(feeds) // HELD_OUT)) if len(feeds) > 1 else 0
        self.learnt, self.held = order[held:], order[: held or 1]

    def place(self, layers: list[Layer], chosen: dict[str, Form]) -> list[str]:
        """Find the parameter of each layer by its content; remarks on those without one.

        A weight that is tied in the module may be two in the graph, a table and the matrix of a product, of a form each.
        """
        lost = []
        for layer in layers:
            form = chosen.get(layer.name)
            if not isinstance(form, Quantized | LowRank):
                continue
            array = torch.from_numpy(layer.stored())
            found = {
                name: turned for turned in (True, False) for name, x in self.original.items() if _holds(x, array, turned)
            }
            places = [(name, use) for name in found for use in layer.kinds]
            if len(found) != 1 or any(place in self.places for place in places):
                lost.append(layer.label)
                continue
            self.parts[layer.name] = (_Factors if isinstance(form, LowRank) else _Codes)(form)
            turned = found[places[0][0]] != (layer.transposed or not layer.products)
            self.places |= dict.fromkeys(places, (layer.name, turned))
        if not self.parts:
            raise QexportError("none of the compressed weights is a parameter of the torch model: compress without healing")
        names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        return [f"not healed, as no single parameter of the torch model holds them: {names}"] if lost else []

    def train(self, steps: int, learning_rate: float, store: Checkpoint, key: str, say) -> None:
        """Go `steps` steps, or those that are left of them by what is stored under `key`."""
        latents = self._latents()
        optimizer = torch.optim.AdamW(latents, lr=learning_rate, weight_decay=0.0)
        with torch.enable_grad(), as_exported(torch):
            first = self._take_up(optimizer, store, key)
            for step in range(first, steps):
                say(f"healing: held-out loss {self.least:.3g}, was {self.before:.3g}", step / steps)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * rate(step, steps)
                loss = self._loss(self._feed(step))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(latents, CLIP)
                optimizer.step()
                for part in self.parts.values():
                    part.limit()
                if (step + 1) % EVERY and step + 1 < steps:
                    continue
                if (now := self._held_out()) < self.least:
                    self.least, self.best, self.best_step = now, self._copy(), step + 1
                self._keep(step + 1, optimizer, store, key)

    def forms(self) -> dict[str, Form]:
        """Of the best step, by the layer's name."""
        self._restore(self.best)
        return {name: part.form() for name, part in self.parts.items()}

    def _take_up(self, optimizer, store: Checkpoint, key: str) -> int:
        """The step to go on with."""
        if not store.has(key):
            self.best, self.best_step = self._copy(), 0
            self.before = self.least = self._held_out()
            return 0
        state = torch.load(io.BytesIO(store.load(key).tobytes()), weights_only=True)
        self._restore(state["latents"])
        optimizer.load_state_dict(state["optimizer"])
        self.best, self.best_step = state["best"], state["best_step"]
        self.before, self.least = state["before"], state["least"]
        return state["step"]

    def _keep(self, step: int, optimizer, store: Checkpoint, key: str) -> None:
        state = {name: getattr(self, name) for name in ("best", "best_step", "before", "least")}
        file = io.BytesIO()
        torch.save(state | {"step": step, "latents": self._copy(), "optimizer": optimizer.state_dict()}, file)
        store.save(key, np.frombuffer(file.getbuffer(), np.uint8))

    def _latents(self) -> list:
        return [latent for part in self.parts.values() for latent in part.latents()]

    def _copy(self) -> list:
        return [latent.detach().clone() for latent in self._latents()]

    @torch.no_grad()
    def _restore(self, values: list) -> None:
        for latent, value in zip(self._latents(), values, strict=True):
            latent.copy_(value)

    def _feed(self, step: int) -> int:
        """The feed of a step: all of them, in an order that is new each time around."""
        around, place = divmod(step, len(self.learnt))
        return int(np.random.default_rng(around).permutation(self.learnt)[place])

    @torch.no_grad()
    def _held_out(self) -> float:
        return float(np.mean([self._loss(int(number)).item() for number in self.held]))

    def _loss(self, number: int):
        """The loss of the module with the compressed weights on one feed."""
        made = {name: part.dense() for name, part in self.parts.items()}

        def value_of(parameter: str, use: str):
            name, turned = self.places.get((parameter, use), (None, False))
            return self.original[parameter] if name is None else made[name].T if turned else made[name]

        parameters = {parameter for parameter, _ in self.places}
        weights = {parameter: value_of(parameter, LINEAR) for parameter in parameters}
        with _Tables({id(weights[parameter]): value_of(parameter, TABLE) for parameter in parameters}):
            value = self._output(number, self.original | weights)
        wanted = self._wanted(number)
        if self.metric.name == COSINE:
            return (value - wanted).square().sum() / wanted.square().sum()
        logs = (torch.log_softmax(x.movedim(self.metric.classes, -1), -1).flatten(0, -2) for x in (value, wanted))
        return functional.kl_div(*logs, log_target=True, reduction="batchmean")

    @torch.no_grad()
    def _wanted(self, number: int):
        """What the original model gives."""
        if number in self.remembered:
            return self.remembered[number]
        value = self._output(number, self.original)
        if (size := value.numel() * value.element_size()) <= self.room:
            self.remembered[number], self.room = value, self.room - size
        return value

    def _output(self, number: int, weights: dict):
        """The rows that count of the output that is compared."""
        feed = self.feeds[number]
        value = self.runnable(feed, weights)[self.metric.output]
        padded = padded_axis(tuple(value.shape), self.metric.symbols, keep_masks(self.manifest, feed))
        return value if padded is None else value.movedim(padded[0], 1)[torch.from_numpy(padded[1])]


class _Tables(TorchFunctionMode):
    """Picks of rows take them from other tensors, by the id of the table: a tied weight may have a form for either use."""

    PICKS = (functional.embedding, torch.embedding, torch.index_select, torch.Tensor.index_select, torch.Tensor.__getitem__)

    def __init__(self, tables: dict):
        super().__init__()
        self.tables = tables

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.PICKS:
            args = tuple(self.tables.get(id(argument), argument) for argument in args)
        return function(*args, **(kwargs or {}))


class _Codes:
    """A quantised matrix that can be learnt: codes as shares of the largest one, and what the scales are multiplied with."""

    def __init__(self, form: Quantized):
        self.start, self.top = form, 2 ** (form.bits - 1)
        self.codes = torch.tensor(form.codes.astype(np.float32) / self.top - 1, requires_grad=True)
        self.scales = torch.tensor(form.scales.astype(np.float32))
        self.factors = torch.ones_like(self.scales, requires_grad=True)

    def latents(self) -> list:
        return [self.codes, self.factors]

    @torch.no_grad()
    def limit(self) -> None:
        """Hold codes in the range that they are stored in; outside of it they would have no way back."""
        self.codes.clamp_(-1, 1 - 1 / self.top)

    def dense(self):
        """The matrix as it will be stored, differentiable as if nothing were rounded."""
        codes = _as_if_exact(self.codes * self.top, torch.round)
        scales = _as_if_exact(self.scales * self.factors, lambda x: x.half().float())
        return codes * scales.repeat_interleave(self.start.block, 0)[: len(codes)]

    @torch.no_grad()
    def form(self) -> Quantized:
        codes = torch.round(self.codes * self.top) + self.top
        scales = (self.scales * self.factors).half()
        return Quantized(codes.numpy().astype(np.uint8), scales.numpy(), self.start.bits, self.start.block)


class _Factors:
    """Low-rank factors that can be learnt."""

    def __init__(self, form: LowRank):
        self.left, self.right, self.table = _Codes(form.left), _Codes(form.right), form.table

    def latents(self) -> list:
        return self.left.latents() + self.right.latents()

    def limit(self) -> None:
        self.left.limit()
        self.right.limit()

    def dense(self):
        left, right = self.left.dense(), self.right.dense()
        return right.T @ left if self.table else left @ right

    def form(self) -> LowRank:
        return LowRank(self.left.form(), self.right.form(), self.table)


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: it rises linearly, then falls as half a cosine (Loshchilov and Hutter, ICLR 2017)."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def _as_if_exact(x, rounding):
    """Rounded, with the gradient of x."""
    return x + (rounding(x) - x).detach()


def _holds(parameter, array, turned: bool) -> bool:
    """Whether an initializer holds a parameter, or its transpose."""
    if parameter.ndim != 2 or not parameter.is_floating_point():
        return False
    seen = parameter.T if turned else parameter
    return seen.shape == array.shape and torch.equal(seen, array)
