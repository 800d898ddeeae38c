"""Which rows of an output count: those of positions that the mask keeps. Padded positions hold garbage in both models.

A value has a padded axis when the model has a 2-D input of kind "mask" (batch, positions) and the value has the batch on
axis 0 and the mask's positions on another axis. That axis is found by the symbolic names of the dimensions where onnxruntime
knows them; else it is the last but one axis of a value of rank 3 or more, when its size is the mask's and its name is not
that of another input's axis, as of a decoder's tokens.
"""

import numpy as np

from qexport.feeds import kept


def keep_masks(manifest: dict, feed: dict[str, np.ndarray]) -> list[tuple[list, np.ndarray, set]]:
    """The 2-D masks of a feed as (symbolic shape, boolean array, true where the position counts, names of other axes)."""
    masks = []
    names = {dim for spec in manifest["inputs"] for dim in spec["shape"] if isinstance(dim, str)}
    for spec in manifest["inputs"]:
        if spec["kind"] != "mask" or feed[spec["name"]].ndim != 2:
            continue
        masks.append((spec["shape"], kept(feed[spec["name"]]), names - set(spec["shape"])))
    return masks


def padded_axis(shape: tuple[int, ...], symbols, masks) -> tuple[int, np.ndarray] | None:
    """The padded axis of a value and the mask (batch, positions) that goes with it; None when the value has none.

    Args:
        shape: the array's shape.
        symbols: the value's dimensions as onnxruntime names them (numbers, names or None).
        masks: from `keep_masks`.
    """
    symbols = list(symbols) if symbols is not None and len(symbols) == len(shape) else [None] * len(shape)
    for (_, position), mask, _ in masks:
        if isinstance(position, str) and position in symbols[1:] and shape[0] == mask.shape[0]:
            axis = symbols.index(position, 1)
            if shape[axis] == mask.shape[1]:
                return axis, mask
    for _, mask, others in masks:
        if len(shape) >= 3 and (shape[0], shape[-2]) == mask.shape and symbols[-2] not in others:
            return len(shape) - 2, mask
    return None


def rows(array: np.ndarray, padded: tuple[int, np.ndarray] | None) -> np.ndarray:
    """The rows of an array that count: (rows, ...); the array itself when it has no padded axis."""
    if padded is None:
        return array
    axis, mask = padded
    return np.moveaxis(array, axis, 1)[mask]


def by_head(array: np.ndarray, heads: int, padded: tuple[int, np.ndarray] | None) -> np.ndarray:
    """An attention output as (heads, elements).

    Args:
        array: (batch, heads, positions, head_size) or (batch, positions, heads * head_size).
        padded: from `padded_axis`; only the rows it keeps are returned.
    """
    chosen = rows(array, padded)
    if array.ndim == 4:
        axis = 1  # (rows, heads, head_size) after the selection, (batch, heads, positions, head_size) without one
    else:
        chosen = chosen.reshape(*chosen.shape[:-1], heads, -1)
        axis = chosen.ndim - 2
    return np.moveaxis(chosen, axis, 0).reshape(heads, -1)


def as_floats(base: np.ndarray, values: list[np.ndarray]):
    """Values whose difference is an error: those of a baseline and of runs.

    Integers and booleans become agreement: 1 for the baseline, 1 or 0 for a run, so that the relative error is the square
    root of the fraction that differs. Infinity in the baseline, as of logits that are forbidden, becomes 0, in a run as well
    where that has the same, else NaN.
    """
    if base.dtype.kind in "biu":
        return np.ones(base.shape), [value == base for value in values]
    infinite = np.isinf(base)
    if not infinite.any():
        return base, values
    values = [np.where(infinite, np.where(value == base, 0.0, np.nan), value) for value in values]
    return np.where(infinite, 0.0, base), values
