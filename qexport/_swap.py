"""What makes writing safe: a look at the place before, files that are whole, exchanging two folders, and signals that wait
or become exceptions."""

import ctypes
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from qexport.errors import QexportError, UsageError

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # linux/fs.h


def exchange(new: Path, target: Path) -> None:
    """Put the folder `new` at `target`; what was at `target` is then at `new`.

    Linux exchanges the two names in one system call. Elsewhere, and on file systems without it, the old folder is
    moved aside first and moved back when the second rename fails.
    """
    if not target.exists():
        os.rename(new, target)
        return
    if sys.platform == "linux" and _rename_exchange(new, target):
        return
    aside = new.with_name(new.name + ".old")
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(aside, target)
        raise
    os.rename(aside, new)


def _rename_exchange(new: Path, target: Path) -> bool:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # a C library older than the call
        return False
    return renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(target), RENAME_EXCHANGE) == 0


@contextmanager
def whole_file(target):
    """Yields a path beside `target` to write to. The file takes the place of `target` on a normal exit and is removed on any
    other: a full disk or Ctrl-C leaves the old one as it was.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(os.path.realpath(target))  # a link stays one
    scratch = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        yield scratch
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def check_writable(target) -> None:
    """Find out before anything runs whether `target` may be put where it is to lie; missing folders will be made.

    Raises:
        QexportError: the folder takes no new files.
    """
    folder = next(parent for parent in Path(os.path.realpath(target)).parents if os.path.exists(parent))
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise QexportError(f"{target}: cannot be written, {folder} is no folder to write to; choose another place")


def check_file(target: Path) -> None:
    """check_writable for a file, whose folder has to be there.

    Raises:
        UsageError: a folder is there, or there is none for the file.
        QexportError: the folder takes no new files.
    """
    if target.is_dir():
        raise UsageError(f"{target}: a folder is there; give the name of a file")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"{target}: there is no folder {target.absolute().parent}; make it, or choose another")
    check_writable(target)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def terminate_as_exception():
    """Inside, SIGTERM raises SystemExit(143), so that `finally` blocks run. Only the main thread may set handlers."""
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None):
        yield
        return

    def stop(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def deferred_signals():
    """Inside, SIGINT and SIGTERM wait; the last one that came is delivered at the end."""
    if not _in_main_thread():
        yield
        return
    came = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, frame: came.append(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if came:
            signal.raise_signal(came[-1])
