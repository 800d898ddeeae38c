"""Tests in C++ of what no op shows by itself: parts of kernels against their definition, in the emulation."""

import subprocess
from pathlib import Path

import pytest

PROGRAMS = sorted(Path(__file__).parent.glob("*_test.cc"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program(emulation, program):
    done = subprocess.run([emulation(program)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
