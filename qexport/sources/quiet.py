"""Keep the talk of torch and transformers (warnings, progress bars, prints) away from the user's terminal."""

import contextlib
import io
import logging
import os
import warnings


@contextlib.contextmanager
def quiet():
    """Silence warnings, logging and Python's stdout and stderr inside the block; errors pass through as exceptions."""
    previous = logging.root.manager.disable
    bars = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.CRITICAL)
    sink = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
        if bars is None:
            os.environ.pop("TQDM_DISABLE", None)
        else:
            os.environ["TQDM_DISABLE"] = bars


def reason_of(error: BaseException, limit: int = 240) -> str:
    """The innermost cause of an exception on one line, as `Type: message`."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
