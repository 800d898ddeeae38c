"""How a call tells how far it is: it calls a function with the step in words and the share that is done, 0 to 1."""


def unwatched(step: str, done: float) -> None:
    """The function where nobody listens."""


def portion(say, start: float, end: float):
    """The function for a piece of the work, from the share `start` to the share `end` of the whole."""
    return lambda step, done: say(step, start + (end - start) * done)
