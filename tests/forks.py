"""Runs a program in a process that branches off one which has imported what takes seconds, all but qexport."""

import contextlib
import faulthandler
import io
import os
import sys
import types
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "transformers.modeling_utils", "onnxscript.optimizer", "onnxruntime", "pytest"])

LONGEST = 900  # seconds


def printed(program: str, folder: Path, *, name: str, arguments=(), environment=None) -> str:
    """What the text of a program prints, in a folder that its imports are looked for in too. Raises what it raises."""
    with ProcessPoolExecutor(1, _FORKS) as pool:
        return pool.submit(_run, program, folder, name, arguments, environment or {}).result()


def _run(program: str, folder: Path, name: str, arguments, environment: dict) -> str:
    assert "qexport" not in sys.modules, "its kernels would be chosen already"
    faulthandler.dump_traceback_later(LONGEST, exit=True)  # who waits for a pool cannot leave it before
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(folder))
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = name
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(program, name, "exec"), main.__dict__)
    return out.getvalue()
