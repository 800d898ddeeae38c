"""Attention on tiles of a processor that need not have them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qexport import _core

ROOT = Path(__file__).parents[1]
FLAGS = "-std=c++17 -O1 -w -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mavx512bf16 -mavx512vnni -ffp-contract=fast"


def test_exact_attention_on_emulated_tiles(tmp_path):
    compiler = os.environ.get("CXX", "g++")
    if "bf16" not in _core.precisions():
        pytest.skip(f"needs products in bfloat16, the kernels for {_core.isa()} have none")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs a C++ compiler, and there is no {compiler}")
    folders = ("cpp/include", "cpp/cpu", "tests/tiles")
    command = [compiler, *FLAGS.split(), "-DQEXPORT_ISA=tiles", "-DQEXPORT_EMULATED_TILES", *(f"-I{ROOT / f}" for f in folders)]
    subprocess.run([*command, ROOT / "tests/tiles/tiles_test.cc", "-o", tmp_path / "tiles_test"], check=True)
    done = subprocess.run([tmp_path / "tiles_test"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
