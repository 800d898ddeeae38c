"""Queries, keys and values of any length up to some: random, or the heads of a file."""

from pathlib import Path

import numpy as np

from qexport.errors import QexportError, UsageError


class Gaussian:
    """`self(n)`: q, k, v ~ N(0, 1), (1, heads, n, head_size) float32; the same for the same n."""

    def __init__(self, heads: int, head_size: int):
        self.heads, self.head_size = heads, head_size

    def __call__(self, n: int) -> tuple[np.ndarray, ...]:
        return tuple(np.random.default_rng(n).standard_normal((3, 1, self.heads, n, self.head_size), dtype=np.float32))


class Activations:
    """`self(n)`: the first n positions of `heads` heads of an .npz file, evenly spaced among all it holds.

    Raises:
        QexportError: the file does not hold float arrays q, k, v of one shape (..., n, head_size).
        UsageError: they have fewer heads or positions.
    """

    def __init__(self, file, heads: int, longest: int):
        try:
            with np.load(Path(file), allow_pickle=False) as data:
                arrays = [data[name] for name in ("q", "k", "v")]
        except KeyError as error:
            raise QexportError(f"{file}: no array {error.args[0].split()[0]}; needs q, k and v") from None
        except Exception as error:  # zipfile, zlib, numpy and OS errors
            reason = getattr(error, "strerror", None) or "not an .npz file with arrays q, k and v"
            raise QexportError(f"{file}: {reason}") from None
        shapes = [x.shape for x in arrays]
        if len(set(shapes)) > 1 or len(shapes[0]) < 2 or 0 in shapes[0] or any(x.dtype.kind != "f" for x in arrays):
            raise QexportError(f"{file}: q, k and v must be floats of one shape (..., n, head_size), got {shapes}")
        merged = [x.reshape(-1, *x.shape[-2:]) for x in arrays]
        count, n, self.head_size = merged[0].shape
        if count < heads or n < longest:
            raise UsageError(f"{file} holds {count} heads of {n} positions; {heads} heads of {longest} were asked for")
        places = np.linspace(0, count - 1, heads).round().astype(int)
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and told
            self._arrays = [x[None, places].astype(np.float32) for x in merged]
        if not all(np.isfinite(x).all() for x in self._arrays):
            raise QexportError(f"{file}: q, k and v hold numbers that are not finite in float32; clean the data")

    def __call__(self, n: int) -> tuple[np.ndarray, ...]:
        return tuple(np.ascontiguousarray(x[:, :, :n]) for x in self._arrays)
