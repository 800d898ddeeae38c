"""Batches of inputs, and checks of one against the inputs that a bundle's manifest lists; what is missing and obvious is
filled in.
"""

from dataclasses import dataclass, field

import numpy as np

from qexport.bundle import Bundle
from qexport.errors import QexportError

DTYPES = {"float32", "float16", "float64", "bool", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"}
# What inputs that were not given are filled with, by kind.
FILLERS = {
    "mask": "ones",
    "token_types": "zeros",
    "position_ids": "0, 1, 2, …",
    "past_length": "zeros",
    "cache": "zeros",
}


@dataclass
class Inputs:
    """Batches of inputs: `feeds` for session.run, `source` in words, `notes` on what was cut or filled in.

    `expected` holds the stored outputs of the classical model for each feed, by name, where the source has them.
    """

    feeds: list[dict[str, np.ndarray]]
    source: str
    notes: list[str] = field(default_factory=list)
    expected: list[dict[str, np.ndarray]] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """Number of batch items, by the first input of each feed."""
        return sum(next((array.shape[0] for array in feed.values() if array.ndim), 1) for feed in self.feeds)


def dim_size(dim, sizes: dict[str, int]) -> int:
    """The size of a dimension: a number, a symbol, or a sum of those ("past_sequence + sequence").

    Raises:
        KeyError: a symbol is not in `sizes`.
    """
    if isinstance(dim, int):
        return dim
    return sum(int(term) if term.strip().isdigit() else sizes[term.strip()] for term in dim.split("+"))


def check_feed(bundle: Bundle, arrays: dict[str, np.ndarray], source: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Check arrays against the manifest's inputs and fill in masks, token types and positions that are missing.

    Returns:
        The feed in the order of the manifest, and notes on what was filled in.

    Raises:
        QexportError: names the input, what is wrong and what is known.
    """
    specs = {spec["name"]: spec for spec in bundle.manifest["inputs"]}
    for name in arrays:
        if name not in specs:
            hint = "; seeds are chosen with --seeds" if name == bundle.seed_input else ""
            raise QexportError(f"{source}: the model has no input {name!r}; it has {', '.join(specs)}{hint}")
    sizes: dict[str, tuple[int, str]] = {}
    feed, notes = {}, []
    for name, spec in specs.items():
        if name in arrays:
            feed[name] = _checked(spec, arrays[name], source, sizes, bundle.manifest["limits"])
    for name, spec in specs.items():
        if name not in feed:
            feed[name] = _filled(spec, sizes, source, list(specs))
            what = "the KV cache" if spec["kind"] == "cache" else f"input {name!r}"  # which has two inputs per layer
            notes.append(f"{what} was not given and is filled with {FILLERS[spec['kind']]}")
    masks = [name for name, spec in specs.items() if spec["kind"] == "mask" and feed[name].ndim == 2]
    if masks and not any(kept(feed[name]).any() for name in masks):
        raise QexportError(f"{source}: input {masks[0]!r} keeps no position; mark those that count")
    _check_room(bundle, feed, source)
    return {name: feed[name] for name in specs}, list(dict.fromkeys(notes))


def _check_room(bundle: Bundle, feed: dict[str, np.ndarray], source: str) -> None:
    """Whether the tokens fit behind the past in the KV cache of a model that has one."""
    cache = bundle.manifest.get("kv_cache")
    if cache is None:
        return
    past, new = int(feed[cache["past_length"]].max()), feed[cache["token_ids"]].shape[1]
    if past + new > cache["length"]:
        raise QexportError(
            f"{source}: {new} tokens behind a past of {past} do not fit into the cache of {cache['length']} tokens; "
            f"lower {cache['past_length']!r} or convert with a longer --kv-cache"
        )


def _filled(spec, sizes, source, names) -> np.ndarray:
    known = {name: size for name, (size, _) in sizes.items()}
    try:
        shape = tuple(dim_size(dim, known) for dim in spec["shape"])
    except KeyError:
        shape = None
    if spec["kind"] not in FILLERS or shape is None:
        raise QexportError(f"{source}: input {spec['name']!r} is missing; the model takes {', '.join(names)}")
    if spec["kind"] == "mask":
        return np.ones(shape, spec["dtype"])
    if spec["kind"] in ("token_types", "past_length", "cache"):
        return np.zeros(shape, spec["dtype"])
    return np.broadcast_to(np.arange(shape[-1]), shape).astype(spec["dtype"])


def _checked(spec, array, source, sizes, limits) -> np.ndarray:
    name, dtype = spec["name"], spec["dtype"]
    where = f"{source}: input {name!r}"
    if dtype not in DTYPES:
        raise QexportError(f"{where} is of type {dtype}, which numpy lacks; it cannot be fed from a file")
    if array.dtype != np.dtype(dtype):
        if not np.can_cast(array.dtype, dtype, "safe"):
            raise QexportError(f"{where} must be {dtype}, got {array.dtype}; convert it with .astype({dtype!r})")
        array = array.astype(dtype)
    if array.ndim != len(spec["shape"]):
        raise QexportError(f"{where} must have {len(spec['shape'])} dimensions {_shown(spec['shape'])}, got {array.shape}")
    if array.size == 0:
        raise QexportError(f"{where} is empty, its shape is {array.shape}; give at least one sample")
    for axis, (dim, got) in enumerate(zip(spec["shape"], array.shape, strict=True)):
        if isinstance(dim, int):
            if dim != got:
                raise QexportError(f"{where} must have size {dim} on axis {axis}, got {got}")
        elif dim.isidentifier():
            if dim in limits and got > limits[dim]:
                raise QexportError(f"{where}: {dim} {got} is longer than the model takes ({limits[dim]}); shorten it")
            if sizes.setdefault(dim, (got, name))[0] != got:
                size, other = sizes[dim]
                raise QexportError(f"{where} has {dim} {got}, but {other!r} has {size}; they must agree")
    _check_values(spec, array, where)
    return array


def _check_values(spec, array, where) -> None:
    if array.dtype.kind == "f":
        bad = ~np.isfinite(array)
        # -inf is how additive masks say "no"
        if spec["kind"] == "mask":
            bad &= array != -np.inf
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise QexportError(
                f"{where} holds {int(bad.sum())} NaN or infinite values, the first at {first}; clean the data"
            )
    high = spec.get("high")
    if high and array.dtype.kind in "iu" and spec["kind"] != "mask":
        low, top = int(array.min()), int(array.max())
        if low < 0 or top >= high:
            raise QexportError(f"{where} must lie in [0, {high}), got {low if low < 0 else top}")


def kept(mask: np.ndarray) -> np.ndarray:
    """A mask as booleans, true where a position counts: additive masks are 0 there and very negative elsewhere."""
    additive = mask.dtype.kind == "f" and mask.size > 0 and mask.max() <= 0
    return mask == 0 if additive else mask != 0


def _shown(shape) -> str:
    return "(" + ", ".join(str(dim) for dim in shape) + ")"
