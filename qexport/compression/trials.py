"""Tries compressed weights in the model itself, before any file is written: one session, its weights fed in."""

from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from qexport import runtime
from qexport.bundle import Bundle
from qexport.compression.layers import Layer, find_layers
from qexport.compression.products import Rounded, multiply
from qexport.errors import QexportError
from qexport.external_data import load_structure
from qexport.metrics import Metric
from qexport.validation.comparison import seeded_feed
from qexport.validation.probes import add_outputs, open_probe
from qexport.validation.unpadded import keep_masks, padded_axis, rows


class Trials:
    """What the converted model gives with other weights, held against the classical model on the same inputs.

    Args:
        session: of the converted model, from `opened`.
        classical: a session of the classical model; a `Remembered` one where the feeds come again.
        metric: the figure that is compared.
        feeds: the batches.
    """

    def __init__(self, bundle: Bundle, session, classical, metric: Metric, feeds: list[dict]):
        self.bundle, self.session, self.classical = bundle, session, classical
        self.metric, self.feeds = metric, feeds
        self.outputs = [output for output in classical.get_outputs() if "float" in output.type]

    def of(self, session) -> "Trials":
        """The same of another session."""
        return Trials(self.bundle, session, self.classical, self.metric, self.feeds)

    def measure(self, weights: dict[str, np.ndarray], most: int | None = None) -> "Measured":
        """The figures with other weights.

        Args:
            weights: by the name of the initializer; those that are not named are the model's own.
            most: batches that are run; all when None.

        Raises:
            QexportError: the classical model's figure is not finite.
        """
        manifest, metric = self.bundle.manifest, self.metric
        names = [output.name for output in self.outputs]
        judged = names.index(metric.output)
        totals, errors, norms, count = np.zeros(2), np.zeros(len(names)), np.zeros(len(names)), 0
        for feed in self.feeds[:most]:
            base = runtime.run(self.classical, names, feed)
            found = runtime.run(self.session, names, {**seeded_feed(feed, self.bundle.seed_input, 0), **weights})
            sums = [metric.add(manifest, feed, base[judged], values[judged]) for values in (base, found)]
            totals, count = totals + [s for s, _ in sums], count + sums[0][1]
            masks = keep_masks(manifest, feed)
            for i, output in enumerate(self.outputs):
                padded = padded_axis(base[i].shape, output.shape, masks)
                # a part at a time: logits are large
                for kept, other in zip(rows(base[i], padded), rows(found[i], padded), strict=True):
                    kept = kept.astype(np.float64)
                    errors[i], norms[i] = errors[i] + np.square(other - kept).sum(), norms[i] + np.square(kept).sum()
        classical, figure = (float(metric.mean(total, count)) for total in totals)
        error = float(np.mean(errors / np.maximum(norms, 1e-300)) ** 0.5)
        if not np.isfinite(classical):
            raise QexportError(
                f"{self.bundle.path}: the classical model has {metric.name} {classical} on this data; choose another metric"
            )
        return Measured(classical, figure, float(metric.loss(figure, classical)), error)


@dataclass(frozen=True)
class Measured:
    """The metric of both models, what the other one lost against the classical, and its relative error: the root mean square
    of those of all outputs."""

    classical: float
    figure: float
    loss: float
    error: float


@contextmanager
def opened(
    bundle: Bundle, layers: list[Layer], library, outputs: list[str] | None = None, rounded: tuple[Rounded, ...] = ()
):
    """A session of the converted model whose weights `layers` can be fed; those that are not fed are its own.

    Args:
        outputs: the values that it computes, and nothing that these do not need; the model's outputs when None.
        rounded: the products that are of whole numbers.
    """
    model = load_structure(bundle.model_path)
    if rounded:
        graph = ir.from_proto(model)
        multiply(graph, find_layers(graph), rounded)
        model = ir.to_proto(graph)
    for layer in layers:
        kind = layer.value.const_value.dtype
        model.graph.input.append(onnx.helper.make_tensor_value_info(layer.name, int(kind), layer.shape))
    if outputs is not None:
        del model.graph.output[:]
        add_outputs(model, outputs)
    with open_probe(model, bundle.model_path, library=library) as session:
        yield session
