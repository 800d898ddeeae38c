"""Healing: a short distillation that moves the codes and scales of compressed weights towards the original model's outputs.

GPTQ and low-rank factors make each layer's own error small; what is left adds up through the model. Here the torch module
that the graph was exported from runs with the compressed weights in place, and their codes and scales follow the gradient of
the difference to the original outputs: through rounding as if it were not there (the straight-through estimator, Bengio et
al. 2013), and with the scales as parameters of their own (LSQ, Esser et al., ICLR 2020).
"""

import hashlib
import io
import math
from dataclasses import dataclass

import numpy as np

from qexport.compression.checkpoint import Checkpoint
from qexport.compression.forms import Form
from qexport.compression.layers import Layer
from qexport.compression.lowrank import LowRank
from qexport.compression.quantize import Quantized
from qexport.errors import QexportError, UsageError
from qexport.metrics import COSINE, Metric
from qexport.sources import Source
from qexport.sources.runnable import as_exported
from qexport.validation.unpadded import keep_masks, padded_axis

STEPS = 300
# Of Adam, for codes as shares of the largest code and for scales as shares of themselves.
LEARNING_RATE = 1e-3
WARMUP = 0.05
CLIP = 1.0
# Steps between two looks at the held-out feeds, each of which is kept.
EVERY = 25
# Feeds are held out to tell the best state: one in so many, but no more than MOST_HELD.
HELD_OUT, MOST_HELD = 16, 4
# Outputs of the original model that are remembered, in bytes.
REMEMBERED = 512 * 2**20


@dataclass(frozen=True)
class Healed:
    """What healing made of the forms.

    Attributes:
        forms: by the layer's name, all that were given; those that no step improved are the given ones.
        before, after: the loss on the held-out feeds: nats of KL divergence per position for logits, else the relative
            squared error of the output.
        step: the one that the forms are from; 0 for the given ones.
        notes: what was left alone, and why.
    """

    forms: dict[str, Form]
    before: float
    after: float
    step: int
    notes: list[str]


def heal(
    source: Source,
    layers: list[Layer],
    chosen: dict[str, Form | None],
    feeds: list[dict[str, np.ndarray]],
    *,
    metric: Metric,
    store: Checkpoint,
    say,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
) -> Healed:
    """Improve compressed weights by distillation against the torch module that they come from.

    A stopped run goes on from its last kept step when it is called again with the same arguments and `store`, and gives
    what it would have given.

    Args:
        source: with the torch module, from `open_source`.
        layers: of the graph that was exported from it.
        chosen: the form of each layer by its name; None, and float16, stay.
        feeds: batches of inputs.
        metric: tells the output and what counts: the KL divergence of logits, or the squared error of other outputs.
        say: called with the step in words and the share that is done.
        steps: batches that are learnt from.

    Raises:
        UsageError: the model is no torch module, or `steps` or `learning_rate` is not positive.
        QexportError: no weight is found in the module.
    """
    import torch

    if source.runnable is None:
        raise UsageError(f"{source.name}: healing needs the torch model; give its folder or package.module:callable")
    if steps < 1 or not learning_rate > 0:
        raise UsageError(f"healing needs steps >= 1 and a learning rate > 0, got {steps} and {learning_rate}")
    run = _Distillation(torch, source, metric, feeds)
    notes = run.place(layers, chosen)
    key = f"healing {steps} {learning_rate} {_digest(chosen)}"
    torch.set_grad_enabled(True)
    with as_exported(torch):
        run.train(steps, learning_rate, store, key, say)
    if run.best_step == 0:
        notes.append(f"healing: none of {steps} steps improved the held-out data; the weights are as they were")
    run.restore(run.best)
    forms = chosen | {name: part.form() for name, part in run.parts.items()} if run.best_step else dict(chosen)
    return Healed(forms, run.before, run.least, run.best_step, notes)


class _Distillation:
    """The module with latent weights in it, and its loss against itself without them."""

    def __init__(self, torch, source: Source, metric: Metric, feeds: list[dict]):
        self.torch, self.runnable, self.metric, self.feeds = torch, source.runnable, metric, feeds
        self.manifest = {"inputs": [spec.to_dict() for spec in source.inputs]}
        self.original = self.runnable.weights()
        self.parts, self.places = {}, {}
        self.remembered, self.room = {}, REMEMBERED
        order = np.random.default_rng(0).permutation(len(feeds))
        held = min(MOST_HELD, -(-len(feeds) // HELD_OUT)) if len(feeds) > 1 else 0
        self.learnt, self.held = order[held:], order[: held or 1]

    def place(self, layers: list[Layer], chosen: dict[str, Form | None]) -> list[str]:
        """Find the parameter of each layer by its content; remarks on those without one."""
        wanted = [layer for layer in layers if isinstance(chosen.get(layer.name), Quantized | LowRank)]
        lost = []
        for layer in wanted:
            array = self.torch.from_numpy(layer.stored())
            fits = [
                (name, turned) for name, x in self.original.items() for turned in (False, True) if _same(x, array, turned)
            ]
            if len({name for name, _ in fits}) != 1:
                lost.append(layer.label)
                continue
            name, turned = fits[0]
            form = chosen[layer.name]
            self.parts[layer.name] = (_Factors if isinstance(form, LowRank) else _Codes)(self.torch, form)
            self.places[layer.name] = name, turned != (layer.transposed or not layer.products)
        if not self.parts:
            raise QexportError(
                f"none of the {len(wanted)} compressed weights is a parameter of the torch model; leave --heal out"
            )
        return [
            f"healing left {len(lost)} of {len(wanted)} weights alone, whose parameters are not found: {', '.join(lost[:3])}"
        ] * bool(lost)

    def train(self, steps: int, learning_rate: float, store: Checkpoint, key: str, say) -> None:
        """Go `steps` steps, or those that are left of them."""
        torch = self.torch
        latents = self._latents()
        optimizer = torch.optim.AdamW(latents, lr=learning_rate, weight_decay=0.0)
        if store.has(key):
            state = torch.load(io.BytesIO(store.load(key).tobytes()), weights_only=True)
            self.restore(state["latents"])
            optimizer.load_state_dict(state["optimizer"])
            first, self.best, self.best_step = state["step"], state["best"], state["best_step"]
            self.before, self.least = state["before"], state["least"]
        else:
            first, self.best, self.best_step = 0, self._copy(), 0
            self.before = self.least = self._held_out()
        for step in range(first, steps):
            say(f"healing: loss {self.least:.3g} of {self.before:.3g} left", step / steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * _rate(step, steps)
            loss = self._loss(self._feed(step))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(latents, CLIP)
            optimizer.step()
            with torch.no_grad():
                for part in self.parts.values():
                    part.limit()
            if (step + 1) % EVERY and step + 1 < steps:
                continue
            if (now := self._held_out()) < self.least:
                self.least, self.best, self.best_step = now, self._copy(), step + 1
            file = io.BytesIO()
            names = ("best", "best_step", "before", "least")
            state = {name: getattr(self, name) for name in names}
            state |= {"step": step + 1, "latents": self._copy(), "optimizer": optimizer.state_dict()}
            torch.save(state, file)
            store.save(key, np.frombuffer(file.getbuffer(), np.uint8))

    def restore(self, values: list) -> None:
        """Set the latent tensors."""
        with self.torch.no_grad():
            for latent, value in zip(self._latents(), values, strict=True):
                latent.copy_(value)

    def _latents(self) -> list:
        return [latent for part in self.parts.values() for latent in part.latents()]

    def _copy(self) -> list:
        return [latent.detach().clone() for latent in self._latents()]

    def _feed(self, step: int) -> int:
        """The feed of a step: all of them in an order that is new each time around."""
        around, place = divmod(step, len(self.learnt))
        return int(np.random.default_rng(around).permutation(self.learnt)[place])

    def _held_out(self) -> float:
        with self.torch.no_grad():
            return float(np.mean([self._loss(int(number)).item() for number in self.held]))

    def _loss(self, number: int):
        """The loss of the module with the compressed weights on one feed."""
        weights = dict(self.original)
        for name, (parameter, turned) in self.places.items():
            dense = self.parts[name].dense()
            weights[parameter] = dense.T if turned else dense
        value, wanted = self._output(number, weights), self._wanted(number)
        if self.metric.name == COSINE:
            return (value - wanted).square().sum() / wanted.square().sum()
        log = self.torch.log_softmax
        return self.torch.nn.functional.kl_div(log(value, -1), log(wanted, -1), log_target=True, reduction="sum") / (
            value.numel() / value.shape[-1]
        )

    def _wanted(self, number: int):
        if number in self.remembered:
            return self.remembered[number]
        with self.torch.no_grad():
            value = self._output(number, self.original)
        if (size := value.numel() * value.element_size()) <= self.room:
            self.remembered[number], self.room = value, self.room - size
        return value

    def _output(self, number: int, weights: dict):
        """The rows that count of the output that is compared."""
        feed = self.feeds[number]
        value = self.runnable(feed, weights)[self.metric.output]
        padded = padded_axis(tuple(value.shape), self.metric.symbols, keep_masks(self.manifest, feed))
        return value if padded is None else value.movedim(padded[0], 1)[self.torch.from_numpy(padded[1])]


class _Codes:
    """A quantised matrix that can be learnt: codes as shares of the largest one, and what the scales are multiplied with."""

    def __init__(self, torch, form: Quantized):
        self.torch, self.start, self.top = torch, form, 2 ** (form.bits - 1)
        self.codes = torch.tensor(form.codes.astype(np.float32) / self.top - 1, requires_grad=True)
        self.scales = torch.tensor(form.scales.astype(np.float32))
        self.factors = torch.ones_like(self.scales, requires_grad=True)

    def latents(self) -> list:
        return [self.codes, self.factors]

    def limit(self) -> None:
        """Hold codes in the range that they are stored in; beyond it they would have no way back."""
        self.codes.clamp_(-1, 1 - 1 / self.top)

    def dense(self):
        """The matrix as it will be stored, differentiable as if nothing were rounded."""
        codes = _straight_through(self.codes * self.top, self.torch.round)
        scales = _straight_through(self.scales * self.factors, lambda x: x.half().float())
        return codes * scales.repeat_interleave(self.start.block, 0)[: len(codes)]

    def form(self) -> Quantized:
        with self.torch.no_grad():
            codes = self.torch.round(self.codes * self.top) + self.top
            scales = (self.scales * self.factors).half()
        return Quantized(codes.numpy().astype(np.uint8), scales.numpy(), self.start.bits, self.start.block)


class _Factors:
    """Two of them that are multiplied."""

    def __init__(self, torch, form: LowRank):
        self.left, self.right, self.table = _Codes(torch, form.left), _Codes(torch, form.right), form.table

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


def _straight_through(x, rounding):
    return x + (rounding(x) - x).detach()


def _same(parameter, array, turned: bool) -> bool:
    """Whether an initializer holds a parameter, or its transpose."""
    if parameter.ndim != 2 or not parameter.is_floating_point():
        return False
    seen = parameter.T if turned else parameter
    return seen.shape == array.shape and bool((seen == array).all())


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: a linear warmup, then half a cosine to zero (Loshchilov and Hutter, ICLR 2017)."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def _digest(chosen: dict[str, Form | None]) -> str:
    """What tells forms from others."""
    found = hashlib.sha256()
    for name, form in sorted(chosen.items()):
        found.update(f"{name} {form.nbytes if form else 0}".encode())
        for part in (form.left, form.right) if isinstance(form, LowRank) else (form,):
            if isinstance(part, Quantized):
                found.update(part.codes.tobytes() + part.scales.tobytes())
    return found.hexdigest()
