"""How a call tells how far it is: it calls a function with the step in words and the share that is done, 0 to 1."""

from qexport.errors import UsageError


def unwatched(step: str, done: float) -> None:
    """The function where nobody listens."""


def listener(progress):
    """The function that a caller gave, or that for nobody.

    Raises:
        UsageError: it is no function.
    """
    if progress is not None and not callable(progress):
        raise UsageError(f"progress must be a function of the step in words and the share done, got {progress!r}")
    return progress or unwatched


def portion(say, start: float, end: float):
    """The function for a piece of the work, from the share `start` to the share `end` of the whole."""
    return lambda step, done: say(step, start + (end - start) * done)
