"""Numbers and lists that callers hand over, checked before anything is done with them."""

import operator

from qexport.errors import UsageError
from qexport.failures import one_line


def whole(name: str, value, least: int = 1) -> int:
    """A whole number of at least `least`.

    Raises:
        UsageError: it is another one, or none.
    """
    try:
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
