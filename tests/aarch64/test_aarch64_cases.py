"""The cases that .ci/aarch64 runs on an emulated ARM processor: here they run where they were made, and the runner fails
where a number is another one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import make_cases
import numpy as np
import pytest

from qexport import _core, get_library_path
from qexport.ops import OPS

RUNNER = Path(__file__).parent / "run_cases.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("aarch64") / "cases"
    make_cases.make(path)
    return path


def run(folder):
    """(exit status, lines) of the runner."""
    command = [sys.executable, str(RUNNER), get_library_path(), str(folder), "--module", _core.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_every_case_is_the_same_where_it_was_made(folder):
    """The same machine: no rounding between the two runs."""
    status, lines = run(folder)
    assert status == 0, lines
    counts = [line.split() for line in lines[:-1]]
    assert all(line[line.index("outputs,") - 1] == line[line.index("equal") - 1] for line in counts), lines
    count = len(json.loads((folder / "cases.json").read_text()))
    assert lines[-1].endswith(f"{_core.isa()} kernels: {count} cases, 0 failed")


def test_every_op_and_strategy_has_cases(folder):
    models = b"".join(path.read_bytes() for path in folder.glob("*.onnx"))
    assert {spec.name for spec in OPS if spec.name.encode() not in models} == set()
    for strategy in make_cases.STRATEGIES:
        assert len(list(folder.glob(f"attention-*-{strategy}-*.onnx"))) >= len(make_cases.FORMS), strategy


@pytest.mark.parametrize("strategy", make_cases.DRAWING)
def test_one_hot_values_show_what_was_drawn(folder, strategy):
    Y = np.load(folder / f"draws-{strategy}.npz")["out:Y"]
    assert 0.5 * make_cases.SAMPLES < (Y != 0).sum(-1).mean() <= make_cases.SAMPLES
    np.testing.assert_allclose(Y.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "output", "change", "message"),
    [
        ("attention-causal_with_past-exact-float32", "Y", lambda y: y * (1 + 1e-4), "off by 0.0001"),
        ("attention-causal_with_past-exact-float32", "Y", lambda y: np.where(y == y.max(), np.nan, y), "off by inf"),
        ("attention-causal_with_past-exact-float32", "Y", lambda y: y[..., :-1], "off by inf"),
        ("attention-3d_grouped_odd-tree-float16", "Y", lambda y: y * np.float32(1.01), "off by 0.0099"),
        ("draws-naive", "Y", lambda y: np.roll(y, 1, -1), "not equal bit for bit"),
        ("draws-adaptive", "Y", lambda y: np.roll(y, 1, -1), "other keys were drawn"),
        ("measure-float32", "frequencies", lambda y: np.nextafter(y, 2), "not equal bit for bit"),
        ("noise-depolarizing-replace-local", "noisy", lambda y: y[::-1], "off by"),
        ("encode-float64", "ranks", lambda y: y + 1, "not equal bit for bit"),
        ("module-philox", "3", lambda y: y ^ 1, "not equal bit for bit"),
        ("module-trellis_encode-2", "0", lambda y: y[::-1], "not equal bit for bit"),
    ],
)
def test_the_runner_finds_a_planted_difference(folder, tmp_path, name, output, change, message):
    (case,) = (case for case in json.loads((folder / "cases.json").read_text()) if case["name"] == name)
    (tmp_path / "cases.json").write_text(json.dumps([case]))
    if "function" not in case:
        shutil.copy(folder / f"{name}.onnx", tmp_path)
    arrays = dict(np.load(folder / f"{name}.npz"))
    np.savez(tmp_path / f"{name}.npz", **arrays | {f"out:{output}": change(arrays[f"out:{output}"])})
    status, lines = run(tmp_path)
    assert status == 1
    assert lines[0].startswith(f"FAILED {name}: ")
    assert message in lines[0]


def test_no_cases_are_a_failure(tmp_path):
    (tmp_path / "cases.json").write_text("[]")
    assert run(tmp_path)[0] == 1
