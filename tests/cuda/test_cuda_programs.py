"""Tests in C++ of what no op shows by itself: parts of kernels against their definition, in the emulation, and what the
emulation itself notices."""

import subprocess
from pathlib import Path

import emulation_library
import pytest

PROGRAMS = sorted(Path(__file__).parent.glob("*_test.cc"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_program(emulation, program):
    if program.stem == "races_test":
        built = emulation(program, races=True, kernels=False)
    elif program.stem == "emulation_test" and emulation_library.RACES:
        pytest.skip("some of its kernels race, to show what that does")
    else:
        built = emulation(program)
    done = subprocess.run([built], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
