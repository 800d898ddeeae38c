"""Runs the cases of make_cases.py on this machine and compares with what the machine that made them computed.

    python run_cases.py LIBRARY FOLDER [--module FILE]

LIBRARY is a libqexport_ops.so, FILE a qexport/_core*.so, whose cases are left out without it. Needs numpy and onnxruntime
alone. Exits with 1 where a case differs.
"""

import argparse
import importlib.util
import json
import platform
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnxruntime


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest finite number of `expected`; inf where shapes, types, infinities or NaN
    differ."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return np.inf
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return np.inf
    largest = np.abs(expected[finite]).max(initial=0)
    return float(np.abs(got - expected)[finite].max(initial=0) / (largest or 1))


def fault(got: np.ndarray, expected: np.ndarray, check: dict) -> str:
    """What is wrong with an output; "" is nothing."""
    if check.get("equal") and (got.dtype != expected.dtype or not np.array_equal(got, expected)):
        return "not equal bit for bit"
    if check.get("zeros") and not np.array_equal(got == 0, expected == 0):
        return "zero at other places: other keys were drawn"
    found = difference(got, expected)
    return "" if found <= check["limit"] else f"off by {found:.2g} of its largest number, allowed are {check['limit']:.2g}"


def run_model(case: dict, folder: Path, arrays: dict, library: str) -> dict:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(library)
    path = str(folder / f"{case['name']}.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {value.name: arrays[f"in:{value.name}"] for value in session.get_inputs()}
    return dict(zip(case["outputs"], session.run(list(case["outputs"]), feeds), strict=True))


def run_call(case: dict, arrays: dict, module) -> dict:
    inputs = [arrays.get(f"in:{i}") for i in range(case["inputs"])]
    found = getattr(module, case["function"])(*inputs, **case["attributes"])
    found = found if isinstance(found, tuple) else (found,)
    return {name: found[int(name)] for name in case["outputs"]}


def load_module(path: str):
    spec = importlib.util.spec_from_file_location("_core", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(library: str, folder: Path, module_path: str | None) -> int:
    """Number of cases that differ; prints one line for each, and a summary."""
    module = load_module(module_path) if module_path else None
    worst, limits, counts, equal = defaultdict(float), {}, defaultdict(int), defaultdict(int)
    failed = ran = 0
    for case in json.loads((folder / "cases.json").read_text()):
        if "function" in case and module is None:
            continue
        arrays = dict(np.load(folder / f"{case['name']}.npz"))
        results = run_call(case, arrays, module) if "function" in case else run_model(case, folder, arrays, library)
        faults = []
        for name, check in case["outputs"].items():
            expected, kind = arrays[f"out:{name}"], case["kind"]
            if message := fault(results[name], expected, check):
                faults.append(f"{name} is {message}")
            counts[kind] += 1
            equal[kind] += np.array_equal(results[name], expected, equal_nan=True)
            worst[kind] = max(worst[kind], difference(results[name], expected))
            limits[kind] = max(limits.get(kind, 0.0), check["limit"])
        ran += 1
        failed += bool(faults)
        if faults:
            print(f"FAILED {case['name']}: {'; '.join(faults)}")
    for kind, count in counts.items():
        print(
            f"{kind:28} {count:4} outputs, {equal[kind]:4} equal bit for bit, "
            f"largest difference {worst[kind]:.1e}, limit {limits[kind]:.1e}"
        )
    kernels = f", {module.isa()} kernels" if module else ""
    print(f"{platform.machine()}, onnxruntime {onnxruntime.__version__}{kernels}: {ran} cases, {failed} failed")
    return failed if ran else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run stored cases and compare.")
    parser.add_argument("library")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--module")
    given = parser.parse_args()
    sys.exit(1 if run(given.library, given.folder, given.module) else 0)
