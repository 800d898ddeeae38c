"""Inputs of given sizes, made up from what the manifest says of each."""

import re

import numpy as np

from qexport.bundle import Bundle
from qexport.errors import QexportError, UsageError
from qexport.feeds import Inputs, dim_size


def generate(
    bundle: Bundle, *, batch: int = 1, seq: int | None = None, ragged: bool = False, seed: int = 0, dims: dict | None = None
) -> Inputs:
    """Inputs of given sizes: token ids uniform in [0, high), standard normal for continuous inputs, masks of ones, lengths
    of the longest axis. With a KV cache the tokens are the last that fit into it.

    Args:
        batch, seq: sizes of the symbolic dimensions; `seq` is 128, or the model's limit when that is less, when None.
        ragged: masks of random lengths in [seq / 2, seq], the first item full, as padded text has.
        seed: seed of the generator; the same arguments give the same inputs.
        dims: sizes of symbolic dimensions by name, where they differ from `batch` and `seq`.

    Raises:
        UsageError: `seq` is longer than the model takes.
        QexportError: the manifest does not say the range of an integer input.
    """
    manifest = bundle.manifest
    sizes = dimension_sizes(manifest, batch, seq, dims)
    rng = np.random.default_rng(seed)
    feed, lengths = {}, {}
    for spec in manifest["inputs"]:
        shape = tuple(dim_size(dim, sizes) for dim in spec["shape"])
        if spec["kind"] == "lengths":
            axes = [sizes[name] for name, is_batch in symbols(manifest).items() if not is_batch]
            feed[spec["name"]] = np.full(shape, max(axes, default=1), spec["dtype"])
        else:
            feed[spec["name"]] = _generated(spec, shape, rng, ragged, lengths, bundle)
    if (cache := manifest.get("kv_cache")) is not None:
        feed[cache["past_length"]][...] = cache["length"] - feed[cache["token_ids"]].shape[1]
    words = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return Inputs([feed], f"generated ({words})" if words else "generated")


def _generated(spec, shape, rng, ragged, lengths, bundle):
    kind, dtype, high = spec["kind"], spec["dtype"], spec.get("high")
    if kind == "mask":
        mask = np.ones(shape)
        if ragged and len(shape) == 2 and shape[0] > 1:
            # masks of one shape share their lengths, as the rows of one batch do
            if shape not in lengths:
                lengths[shape] = np.concatenate([[shape[1]], rng.integers((shape[1] + 1) // 2, shape[1] + 1, shape[0] - 1)])
            mask = np.arange(shape[1]) < lengths[shape][:, None]
        return mask.astype(dtype)
    if kind == "position_ids":
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    if kind == "token_types":
        return np.zeros(shape, dtype)
    if kind == "boolean" or dtype == "bool":
        return rng.integers(0, 2, shape).astype(dtype)
    if kind in ("token_ids", "integer", "past_length"):
        if not high:
            raise QexportError(f"{bundle.path}: the manifest has no upper bound for input {spec['name']!r}; give --data")
        return rng.integers(0, high, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def dimension_sizes(manifest: dict, batch: int, seq: int | None, dims: dict | None = None) -> dict[str, int]:
    """Sizes of the symbolic dimensions of the inputs: the first axis is the batch, every other one `seq`; when
    that is None, the most that all limits allow, up to 128.

    Raises:
        UsageError: `seq` or a size in `dims` is above the model's limit.
    """
    limits, dims = manifest["limits"], dict(dims or {})
    if seq is None:  # axes of different names may have to be equal
        seq = min([128, *limits.values()])
    sizes = {name: dims.get(name, batch if is_batch else seq) for name, is_batch in symbols(manifest).items()}
    for name, size in sizes.items():
        if name in limits and size > limits[name]:
            raise UsageError(f"{name} {size} is longer than the model takes ({limits[name]}); lower it")
    return sizes


def symbols(manifest: dict) -> dict[str, bool]:
    """The symbolic dimensions of the inputs, and whether each is the batch: called so, or a first axis of inputs that no
    other axis shares and beside which none is called so."""
    found: dict[str, bool] = {}
    for spec in manifest["inputs"]:
        names = [re.findall(r"[A-Za-z_]\w*", dim) if isinstance(dim, str) else [] for dim in spec["shape"]]
        told = any("batch" in name for axis in names for name in axis)
        for axis, name in ((axis, name) for axis, row in enumerate(names) for name in row):
            found[name] = "batch" in name or (axis == 0 and not told and found.get(name, True))
    return found
