"""manifest["min_onnxruntime"] is true: that version runs both models, with and without the library; an older one refuses."""

import subprocess
import sys

import numpy as np
import pytest
from decomposed import POSITIONS, feeds, save
from test_library import runtime_folder

from qexport.conversion import convert
from qexport.installed import get_library_path
from qexport.manifest import min_onnxruntime

# opset: (oldest runtime, a release below it that must refuse the file)
RUNTIMES = {
    17: ("1.20.1", None),
    21: ("1.20.1", None),
    22: ("1.21.1", "1.20.1"),
    23: ("1.23.2", "1.22.1"),
    24: ("1.24.4", "1.23.2"),
}

WORKER = """
import sys
import numpy as np
import onnxruntime as ort
folder, library = sys.argv[1:]
stored = np.load(folder + "/io.npz")
feeds = {k: stored[k] for k in ("input_ids", "attention_mask")}
for name, use in (("classical", False), ("model", False), ("model", True)):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if use:
        options.register_custom_ops_library(library)
    session = ort.InferenceSession(f"{folder}/{name}.onnx", options, providers=["CPUExecutionProvider"])
    print(ort.__version__, np.abs(session.run(None, feeds)[0] - stored["hidden"]).max())
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Bundles of one encoder by opset and recipe, each with its inputs and outputs in io.npz."""
    root = tmp_path_factory.mktemp("runtimes")
    source = save(root)
    made = {}

    def make(opset, **recipe):
        key = str(opset) + "".join(recipe)
        if key not in made:
            report = convert(source, root / key, opset=opset, **recipe)
            assert report.manifest["min_onnxruntime"] == min_onnxruntime(opset, noise="noise" in recipe)
            from qexport.runtime import session

            hidden = session(source, library=False).run(None, feeds())[0]
            np.savez(root / key / "io.npz", hidden=hidden, **feeds())
            made[key] = root / key
        return made[key]

    return make


def run_in(version, folder):
    command = [sys.executable, "-c", WORKER, str(folder), get_library_path()]
    environment = {"PYTHONPATH": str(runtime_folder(version)), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


# What each of them computes is the classical model: all keys are read, or there is no noise.
RECIPES = ({"strategy": "stratified", "num_samples": POSITIONS}, {"noise": "depolarizing:0", "shots": "inf"})


@pytest.mark.registry
@pytest.mark.parametrize("recipe", RECIPES, ids=["sampled", "noisy"])
@pytest.mark.parametrize("opset", RUNTIMES)
def test_the_oldest_runtime_runs_it_and_the_one_before_does_not(folders, opset, recipe):
    noise = "noise" in recipe
    oldest, refuses = ("1.24.4", "1.23.2") if noise and opset == 23 else RUNTIMES[opset]
    folder = folders(opset, **recipe)
    assert oldest.startswith(min_onnxruntime(opset, noise=noise))
    done = run_in(oldest, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [version for version, _ in lines] == [oldest] * 3
    assert all(float(difference) < 1e-5 for _, difference in lines)
    if refuses:
        assert run_in(refuses, folder).returncode != 0
