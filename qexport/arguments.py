"""Numbers, lists and tensors that callers hand over, checked before anything is done with them."""

import operator
from pathlib import Path

from qexport.errors import UsageError
from qexport.failures import one_line


def whole(name: str, value, least: int = 1) -> int:
    """A whole number of at least `least`.

    Raises:
        UsageError: it is another one, or none.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, got {one_line(repr(value))}") from None
    if number < least:
        raise UsageError(f"{name} must be >= {least}, got {number}")
    return number


def wholes(name: str, value, least: int = 1) -> list[int]:
    """A whole number or several, as a list.

    Raises:
        UsageError: there is none, or one is not as `whole` wants it.
    """
    found = [whole(name, number, least) for number in (several(name, value) if _is_several(value) else [value])]
    if not found:
        raise UsageError(f"{name} must hold at least one number")
    return found


def real(name: str, value) -> float:
    """Any number; what limits it has is for the caller to say.

    Raises:
        UsageError: it is none, a text such as "1%" included.
    """
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a number, got {one_line(repr(value))}") from None


def as_seed(value, name: str = "seed") -> int:
    """A seed of draws: an int64, as the kernels and the seed input of a model take it.

    Raises:
        UsageError: it is no whole number, or one of more bits.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not -(2**63) <= number < 2**63:
        raise UsageError(f"{name} must be a whole number of 64 bits, -2^63 to 2^63 - 1, got {one_line(repr(value))}")
    return number


def wrapped_seed(number: int) -> int:
    """The seed that the low 64 bits of a number are: one that is derived from another seed stays one."""
    return (number + 2**63) % 2**64 - 2**63


def as_path(name: str, value) -> Path:
    """A path of a file or folder.

    Raises:
        UsageError: it is neither a text nor a path, or empty, which would be the folder that one is in.
    """
    if value == "":
        raise UsageError(f"{name} is empty; give a path, '.' for the folder that you are in")
    try:
        return Path(value)
    except TypeError:
        raise UsageError(f"{name} must be a str or a Path, got {one_line(repr(value))}") from None


def check_tensors(required: dict, optional: dict | None = None) -> None:
    """Check that arguments, by their names, are torch tensors, or what stands in for one while torch traces.

    Raises:
        UsageError: one is something else; None is allowed for optional ones.
    """
    given = {name: value for name, value in (optional or {}).items() if value is not None}
    for name, value in (required | given).items():
        if not hasattr(value, "__torch_function__"):
            kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
            maker = "from_numpy" if kind == "numpy.ndarray" else "as_tensor"
            mend = "" if value is None else f"; give torch.{maker}({name})"
            raise UsageError(f"{name} must be a torch.Tensor, got {kind}{mend}")


def check_finite(name: str, tensor) -> None:
    """Check that a torch tensor holds neither NaN nor infinity.

    Raises:
        UsageError: it does; the message says where.
    """
    bad = ~tensor.isfinite()
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise UsageError(f"{name} must be finite, got {tensor[tuple(place)].item()} at {place}")


def several(name: str, value) -> list:
    """The items of a list or the like.

    Raises:
        UsageError: it is a single text or number.
    """
    if not _is_several(value):
        raise UsageError(f"{name} must be a list, got {one_line(repr(value))}")
    return list(value)


def _is_several(value) -> bool:
    try:
        len(value)  # an iterator, which can be looked at once, has none
    except TypeError:
        return False
    return not isinstance(value, (str, bytes))
