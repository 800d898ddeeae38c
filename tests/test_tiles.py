"""Attention on tiles of a processor that need not have them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qexport import _core

ROOT = Path(__file__).parents[1]
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mavx512bf16 -mavx512vnni"
EMULATED = "-DQEXPORT_ISA=tiles -DQEXPORT_EMULATED_TILES"


def test_exact_attention_on_emulated_tiles(tmp_path):
    compiler = os.environ.get("CXX", "g++")
    if "bf16" not in _core.precisions():
        pytest.skip(f"needs products in bfloat16, the kernels for {_core.isa()} have none")
    if shutil.which(compiler) is None:
        pytest.skip(f"needs a C++ compiler, and there is no {compiler}")
    folders = [f"-I{ROOT / folder}" for folder in ("cpp/include", "cpp/cpu", "tests/tiles")]
    program = tmp_path / "tiles_test"
    flags = ["-std=c++17", "-O1", "-w", *AVX512.split(), *EMULATED.split(), *folders]
    subprocess.run([compiler, *flags, ROOT / "tests/tiles/tiles_test.cc", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
