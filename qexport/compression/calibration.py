"""What the inputs of each weight look like: Gram matrices of products, and how often the rows of tables are picked."""

import numpy as np

from qexport import runtime
from qexport.bundle import Bundle
from qexport.compression.checkpoint import Checkpoint
from qexport.compression.layers import Layer
from qexport.errors import QexportError
from qexport.external_data import load_structure
from qexport.feeds import Inputs
from qexport.validation.comparison import seeded_feed
from qexport.validation.probes import add_outputs, open_probe
from qexport.validation.unpadded import keep_masks, padded_axis, rows

# Gram matrices that are summed up at a time, in bytes; wider models are run several times.
GRAM_MEMORY = 1 << 30
# Share of a table's weight that is spread over all of its entries.
OTHERS = 1 / 3


def calibrate(bundle: Bundle, layers: list[Layer], inputs: Inputs, library, store: Checkpoint, say) -> None:
    """Put what `weights_of` gives for every layer into `store`.

    Args:
        library: as in `qexport.runtime.session`.
        say: called with the step in words and the share that is done.

    Raises:
        QexportError: the model does not run, or a value that a weight is multiplied with is not finite.
    """
    wanted = {input_names(layer): layer for layer in layers if not layer.is_stack}
    groups, room = [[]], GRAM_MEMORY
    for names, layer in wanted.items():
        if store.has(_key(names)):
            continue
        size = 8 * _size(layer) ** (2 if layer.products else 1)
        if size > room and groups[-1]:
            groups.append([])
            room = GRAM_MEMORY
        groups[-1].append(names)
        room -= size
    for number, group in enumerate(groups if groups[0] else []):
        sums, counts = dict.fromkeys(group, 0), dict.fromkeys(group, 0)
        watched = list(dict.fromkeys(name for names in group for name in names))
        with _session(bundle, watched, library) as session:
            shapes = {output.name: output.shape for output in session.get_outputs()}
            for count, feed in enumerate(inputs.feeds):
                say("watching the inputs of each weight", (number + count / len(inputs.feeds)) / len(groups))
                found = _run(session, watched, seeded_feed(feed, bundle.seed_input, 0))
                masks = keep_masks(bundle.manifest, feed)
                for names in group:
                    for name in names:
                        kept = rows(found[name], padded_axis(found[name].shape, shapes.get(name), masks))
                        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is checked
                            sums[names] = sums[names] + _sum(wanted[names], kept)
                        counts[names] += kept.size // kept.shape[-1] if wanted[names].products else kept.size
        for names, total in sums.items():
            if not np.isfinite(total).all():
                store.remove()  # no run on this model and data will get further
                label = wanted[names].label
                raise QexportError(
                    f"{bundle.path}: the inputs of {label} are not finite on this data, or their squares are not; check the "
                    "weights before it"
                )
            store.save(_count_key(names), counts[names])
            store.save(_key(names), total)


def weights_of(layer: Layer, store: Checkpoint) -> np.ndarray:
    """The Gram matrix of a layer's inputs (in, in), or how much each entry of its table counts (entries,): as often as it
    was picked, and a little more, for other inputs pick others. Experts are picked inside of loops, which nothing watches:
    their rows count alike."""
    if layer.is_stack:
        return np.full(layer.flat_shape[0], 1 / layer.flat_shape[0])
    found = store.load(_key(input_names(layer)))
    return found if found.ndim == 2 else found / max(found.sum(), 1) + OTHERS / (1 - OTHERS) / len(found)


def positions(layer: Layer, store: Checkpoint) -> int:
    """How many inputs of a layer, or picks from its table, `weights_of` comes from."""
    return int(store.load(_count_key(input_names(layer))))


def input_names(layer: Layer) -> tuple[str, ...]:
    """The values that tell how a layer is used: X of its products, or the indices into a table."""
    values = [node.inputs[0] for node in layer.products] or [node.inputs[1] for node in layer.picks]
    return tuple(dict.fromkeys(value.name for value in values))


def _key(names: tuple[str, ...]) -> str:
    return f"inputs {' '.join(names)}"


def _count_key(names: tuple[str, ...]) -> str:
    return f"positions {' '.join(names)}"


def _size(layer: Layer) -> int:
    return layer.shape[1] if layer.products and layer.transposed else layer.shape[0]


def _sum(layer: Layer, value: np.ndarray) -> np.ndarray:
    if layer.products:
        X = value.reshape(-1, value.shape[-1]).astype(np.float32)
        return (X.T @ X).astype(np.float64)
    size = layer.shape[0]
    return np.bincount(value.reshape(-1).astype(np.int64) % size, minlength=size).astype(np.float64)


def _run(session, names: list[str], feed: dict) -> dict[str, np.ndarray]:
    """Values by name; graph inputs come from the feed."""
    computed = [name for name in names if name not in feed]
    values = runtime.run(session, computed, feed) if computed else []  # onnxruntime takes none for all
    return {name: feed[name] for name in names if name in feed} | dict(zip(computed, values, strict=True))


def _session(bundle: Bundle, names: list[str], library):
    model = load_structure(bundle.model_path)
    inputs = {value.name for value in model.graph.input}
    add_outputs(model, [name for name in names if name not in inputs])
    return open_probe(model, bundle.model_path, library=library)
