"""What the emulated device makes of reads that a GPU might not notice."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

READ = """
import ctypes, devices
array = devices.guarded((3,), "float32")
ctypes.string_at(array.__array_interface__["data"][0] + {at}, 4)
"""


@pytest.mark.parametrize(("at", "result"), [(8, 0), (16, -signal.SIGSEGV)])
def test_nothing_is_read_behind_an_array(at, result):
    command = [sys.executable, "-c", READ.format(at=at)]
    assert subprocess.run(command, cwd=Path(__file__).parent).returncode == result
