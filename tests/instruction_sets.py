"""Runs a piece of a test module once more, on another copy of the kernels."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from qexport import _core

# Those that the kernels are compiled for on this architecture.
_X86, _ARM = ("generic", "avx2", "avx512", "avx512bf16", "amx"), ("neon",)
ISAS = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}.get(platform.machine(), ("generic",))


def run_on(isa: str, code: str) -> str:
    """What `code` prints with the tests folder as its own; skips where this processor has no `isa`, or uses it anyway."""
    if isa == _core.isa():
        pytest.skip(f"{isa} is what the other tests run on")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"QEXPORT_ISA": isa},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = (done.stderr.strip().splitlines() or [""])[-1]
    if said.startswith("ValueError: QEXPORT_ISA is"):
        pytest.skip(said)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout
