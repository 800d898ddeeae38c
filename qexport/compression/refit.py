"""Weights fitted once more, to the inputs that the compressed model really gives them.

A form is chosen for inputs X of the original model. Behind compressed weights a layer gets X', off by what they lost, and
can make up for a part of that. Layer by layer, in the order of the graph, with everything before it compressed,

    W* = argmin |X' W* - X W|^2 + d |W* - W|^2 = (X'^T X' + d)^-1 (X'^T X W + d W)

takes the place of W, and is stored by the same method for the Gram matrix X'^T X'. (Least squares against the original
outputs, as GPTQ and its kin reconstruct a layer; here with the error of the inputs in it.)
"""

import numpy as np

from qexport import runtime
from qexport.bundle import Bundle
from qexport.compression.calibration import input_names
from qexport.compression.checkpoint import Checkpoint
from qexport.compression.forms import KEEP, Form, Method, Seen
from qexport.compression.layers import Layer
from qexport.compression.quantize import DAMPING
from qexport.compression.trials import opened
from qexport.validation.comparison import seeded_feed
from qexport.validation.unpadded import keep_masks, padded_axis, rows

# Positions per input of a layer that are enough to fit it to; with few, what is fitted is their noise, so that the ridge is
# the number of inputs over that of positions.
POSITIONS = 16


def refit(
    bundle: Bundle,
    layers: list[Layer],
    methods: tuple[Method, ...],
    chosen: dict[str, Form],
    feeds: list[dict],
    library,
    store: Checkpoint,
    say,
) -> dict[str, Form]:
    """The forms of `chosen`, those of products fitted again; tables, and weights that are also tables, stay.

    Args:
        methods: of the layers; `chosen` holds a form for every layer that is not kept.
        feeds: what is fitted to.
        library: as in `qexport.runtime.session`.
        say: called with the step in words and the share that is done.
    """
    forms, groups, given = dict(chosen), {}, feeds[0].keys()
    for layer, method in zip(layers, methods, strict=True):
        is_product = layer.products and not layer.picks
        if method.kind != KEEP and is_product and not given & set(input_names(layer)):  # what is given has no error
            groups.setdefault(input_names(layer), []).append((layer, method))
    label = " ".join(map(str, methods))
    before = {layer.name: layer.as_stored(forms[layer.name].dense()) for layer in layers if layer.name in forms}
    fitted = {layer.name for group in groups.values() for layer, _ in group}
    weights = {name: array for name, array in before.items() if name not in fitted}
    for number, (names, group) in enumerate(groups.items()):
        say(f"fitting {group[0][0].label} again", number / len(groups))
        key = f"refit {' '.join(names)} {label}"
        found = store.compute(key, lambda n=names: _products(bundle, layers, n, weights, feeds, library))
        gram, cross, seen = *np.split(found[:-1], 2), found[-1, 0]
        share = max(DAMPING, len(gram) / seen)
        ridge = share * max(np.trace(gram) / len(gram), np.finfo(np.float32).tiny)
        inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
        for layer, method in group:
            W = layer.matrix().astype(np.float64)
            target = (inverse @ (cross @ W + ridge * W)).astype(np.float32)
            forms[layer.name] = Seen(layer, gram, target).make(method)
            weights[layer.name] = layer.as_stored(forms[layer.name].dense())
    return forms


def _products(bundle: Bundle, layers, names: tuple[str, ...], weights: dict, feeds: list[dict], library) -> np.ndarray:
    """(2 in + 1, in): X'^T X', below it X'^T X, with X of the original model and X' of the one with these weights, and a row
    of the number of positions."""
    gram = cross = 0.0
    seen = 0
    with opened(bundle, layers, library, list(names)) as session:
        shapes = {output.name: output.shape for output in session.get_outputs()}
        for number in np.random.default_rng(0).permutation(len(feeds)):  # data may be sorted
            feed = feeds[number]
            masks, seeded = keep_masks(bundle.manifest, feed), seeded_feed(feed, bundle.seed_input, 0)
            pairs = (runtime.run(session, list(names), {**seeded, **fed}) for fed in ({}, weights))
            for name, *both in zip(names, *pairs, strict=True):
                padded = padded_axis(both[0].shape, shapes[name], masks)
                X, changed = (rows(x, padded).reshape(-1, x.shape[-1]).astype(np.float32) for x in both)
                gram = gram + (changed.T @ changed).astype(np.float64)
                cross = cross + (changed.T @ X).astype(np.float64)
                seen += len(X)
            if seen >= POSITIONS * len(gram):
                break
    return np.vstack([gram, cross, np.full((1, len(gram)), seen)])
