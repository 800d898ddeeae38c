"""Runs a piece of a test module once more, on another copy of the kernels."""

import platform
from pathlib import Path

import forks
import pytest

from qexport import _core

# Those that the kernels are compiled for on this architecture.
_X86, _ARM = ("generic", "avx2", "avx512", "avx512bf16", "amx"), ("neon",)
ISAS = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}.get(platform.machine(), ("generic",))


def run_on(isa: str, code: str) -> str:
    """What `code` prints with the tests folder as its own; skips where this processor has no `isa`, or uses it anyway."""
    if isa == _core.isa():
        pytest.skip(f"{isa} is what the other tests run on")
    try:
        return forks.printed(code, Path(__file__).parent, name="code", environment={"QEXPORT_ISA": isa})
    except ValueError as error:
        if not str(error).startswith("QEXPORT_ISA is"):
            raise
        pytest.skip(str(error))
