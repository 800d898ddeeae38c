"""How good a model is at its task, held against its classical model: the figure that a sweep follows.

    perplexity   of the given texts; models whose logits for a token do not depend on later ones
    top1         share of the rows of logits whose largest is the classical model's
    cosine       of an item's embedding (the mean over its positions, padding left out) with the classical model's

The loss is perplexity / classical perplexity - 1, or 1 - the mean of the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qexport import runtime
from qexport.bundle import Bundle
from qexport.errors import QexportError, UsageError
from qexport.validation.unpadded import keep_masks, padded_axis, rows

PERPLEXITY, TOP1, COSINE = "perplexity", "top1", "cosine"
METRICS = (PERPLEXITY, TOP1, COSINE)
# Logits of a model that does not look ahead move by rounding alone when a later token changes.
LOOKS_AHEAD = 1e-3


@dataclass(frozen=True)
class Metric:
    """A figure of one output; `tokens` is the input of token ids that perplexity predicts, `classes` the axis of logits."""

    name: str
    output: str
    symbols: tuple
    tokens: str | None = None
    classes: int = -1

    def add(self, manifest: dict, feed: dict, classical: np.ndarray, value: np.ndarray) -> tuple[float, int]:
        """(sum, count) over a batch; `mean` makes the figure of their totals."""
        padded = padded_axis(classical.shape, self.symbols, keep_masks(manifest, feed))
        if self.name == PERPLEXITY:
            return _surprise(feed[self.tokens], value, padded)
        if self.name == TOP1:
            same = rows(classical, padded).argmax(self.classes) == rows(value, padded).argmax(self.classes)
            return float(same.sum()), same.size
        cosines = _cosines(_embeddings(classical, padded), _embeddings(value, padded))
        return float(cosines.sum()), len(cosines)

    def mean(self, total, count: int):
        """The figure of a sum over `count` rows."""
        mean = np.asarray(total) / count
        with np.errstate(over="ignore"):  # infinite is what it is
            return np.exp(mean) if self.name == PERPLEXITY else mean

    def loss(self, figure, classical: float):
        """What `figure` has lost against the classical model's."""
        return figure / classical - 1 if self.name == PERPLEXITY else 1 - figure


def choose_metric(bundle: Bundle, inputs, classical, name: str | None) -> Metric:
    """The metric called `name`, or the one for what the model does: perplexity, top1 where it has logits, cosine.

    Args:
        classical: a session of the classical model.

    Raises:
        UsageError: the model has no such figure, or `name` is unknown.
        QexportError: no output is floating point.
    """
    if name not in (None, *METRICS):
        raise UsageError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    feed = inputs.feeds[0]
    floats = [output for output in classical.get_outputs() if "float" in output.type]
    if not floats:
        raise QexportError(f"{bundle.path}: no output is floating point, so nothing tells how much is lost")
    tokens = next((spec for spec in bundle.manifest["inputs"] if spec["kind"] == "token_ids" and spec.get("high")), None)
    values = dict(zip((o.name for o in floats), runtime.run(classical, [o.name for o in floats], feed), strict=True))

    def is_vocabulary(value):
        return tokens is not None and value.ndim == 3 and value.shape[::2] == (len(feed[tokens["name"]]), tokens["high"])

    logits = [o for o in floats if "logit" in o.name or is_vocabulary(values[o.name])]
    found = {COSINE: Metric(COSINE, floats[0].name, tuple(floats[0].shape))}
    if logits:
        # Logits of the pixels of an image are (batch, classes, height, width).
        classes = 1 if tokens is None and values[logits[0].name].ndim > 3 else -1
        found[TOP1] = Metric(TOP1, logits[0].name, tuple(logits[0].shape), classes=classes)
        if is_vocabulary(values[logits[0].name]) and _looks_back(classical, logits[0].name, feed, tokens, values):
            found[PERPLEXITY] = Metric(PERPLEXITY, logits[0].name, tuple(logits[0].shape), tokens["name"])
    if name is None:
        return next(found[known] for known in METRICS if known in found)
    if name not in found:
        raise UsageError(f"metric {name} does not fit {bundle.path}; it has {', '.join(found)}")
    return found[name]


def _looks_back(classical, output: str, feed: dict, tokens: dict, values: dict) -> bool:
    """Whether logits stay when the last token changes, all but its own."""
    ids = feed[tokens["name"]].copy()
    if ids.ndim != 2 or ids.shape[1] < 2:
        return False
    ids[:, -1] = (ids[:, -1] + 1) % tokens["high"]
    before = values[output][:, :-1]
    after = runtime.run(classical, [output], {**feed, tokens["name"]: ids})[0][:, :-1]
    with np.errstate(invalid="ignore"):  # a model may give infinity
        return bool(np.abs(after - before).max() <= LOOKS_AHEAD * np.abs(before).max())


def _surprise(ids: np.ndarray, logits: np.ndarray, padded) -> tuple[float, int]:
    """Negative log likelihood of every token behind the first one, and their number."""
    keep = np.ones(ids.shape, bool) if padded is None else padded[1]
    counted = keep[:, 1:] & keep[:, :-1]
    total = 0.0
    for tokens, x, kept in zip(ids[:, 1:], logits[:, :-1], counted, strict=True):  # one item at a time: logits are large
        x = x[kept].astype(np.float64)
        top = x.max(-1, keepdims=True)
        log_sum = np.log(np.exp(x - top).sum(-1)) + top[:, 0]
        total += float((log_sum - x[np.arange(len(x)), tokens[kept]]).sum())
    return total, int(counted.sum())


def _embeddings(value: np.ndarray, padded) -> np.ndarray:
    """(batch, numbers): the mean over the positions that count; all of an item's numbers where there is one position, or an
    image, whose axes tell nothing of what they are."""
    value = value.astype(np.float64)
    if value.ndim < 3 or (padded is None and value.ndim > 3):
        return value.reshape(len(value), -1)
    axis, mask = padded or (1, np.ones(value.shape[:2], bool))
    moved = np.moveaxis(value, axis, 1)
    weights = mask.reshape(*mask.shape, *[1] * (moved.ndim - 2))
    return ((moved * weights).sum(1) / np.maximum(weights.sum(1), 1)).reshape(len(value), -1)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(1), norms, out=np.ones_like(norms), where=norms > 0)
