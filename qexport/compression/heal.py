"""Healing: a short distillation that moves the codes and scales of compressed weights towards the original model's outputs.

GPTQ and low-rank factors make each layer's own error small; what is left adds up through the model. Here the torch module
that the graph was exported from runs with the compressed weights in place, and their codes and scales follow the gradient of
the difference to the original outputs.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from qexport.compression.checkpoint import Checkpoint
from qexport.compression.forms import Form
from qexport.compression.layers import Layer
from qexport.compression.lowrank import LowRank
from qexport.compression.quantize import Quantized
from qexport.errors import QexportError, UsageError
from qexport.metrics import Metric
from qexport.sources.quiet import reason_of
from qexport.sources.source import Source

# Of Adam, for codes as shares of the largest code and for scales as shares of themselves.
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Healed:
    """What healing made of the forms.

    Attributes:
        forms: by the layer's name, all that were given; where no step improved them, the given ones.
        before, after: the loss on held-out feeds: nats of KL divergence per position for logits, else the relative squared
            error of the output.
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
    chosen: dict[str, Form],
    feeds: list[dict[str, np.ndarray]],
    *,
    steps: int,
    metric: Metric,
    store: Checkpoint,
    say,
    learning_rate: float = LEARNING_RATE,
) -> Healed:
    """Improve compressed weights by distillation against the torch module that they come from.

    A stopped run goes on from its last kept step when it is called again with the same arguments and `store`, and gives
    what it would have given.

    Args:
        source: from `open_source`, of a torch model.
        layers: weights of the graph that was exported from it, or converted from that.
        chosen: the form of each layer by its name; float16 stays as it is.
        feeds: batches of inputs, a few of which are held out to tell the best step.
        steps: batches that are learnt from.
        metric: tells the output, and what is made small: for perplexity and top1 the KL divergence from the original
            distribution, else the squared error. Padding does not count.
        store: where progress is kept.
        say: called with the step in words and the share that is done.

    Raises:
        UsageError: the model is no torch module, or `steps` or `learning_rate` is not positive.
        QexportError: no weight is found in the module, or torch cannot run it, forward or backward, on these inputs.
    """
    if source is None or source.runnable is None:
        raise UsageError("healing needs the torch model: give its folder or package.module:callable, not a file or a bundle")
    if steps < 1 or not learning_rate > 0:
        raise UsageError(f"healing needs steps >= 1 and a learning rate > 0, got {steps} and {learning_rate}")
    from qexport.compression.distillation import Distillation

    run = Distillation(source, metric, feeds)
    notes = run.place(layers, chosen)
    try:
        run.train(steps, learning_rate, store, f"healing {steps} {learning_rate} {_digest(chosen)}", say)
    except RuntimeError as error:  # what torch raises for shapes, memory and missing gradients
        raise QexportError(f"{source.name}: torch cannot learn on these inputs: {reason_of(error)}") from error
    if run.best_step == 0:
        notes.append(f"none of {steps} steps of healing made the held-out loss smaller: the weights are as they were")
        return Healed(dict(chosen), run.before, run.least, 0, notes)
    return Healed(chosen | run.forms(), run.before, run.least, run.best_step, notes)


def _digest(chosen: dict[str, Form]) -> str:
    """What tells forms from others."""
    found = hashlib.sha256()
    for name, form in sorted(chosen.items()):
        found.update(name.encode())
        for part in (form.left, form.right) if isinstance(form, LowRank) else (form,):
            if isinstance(part, Quantized):
                found.update(part.codes.tobytes() + part.scales.tobytes())
    return found.hexdigest()
