#!/usr/bin/env python3
"""Runs the model of this folder on the stored samples, compares its outputs with the stored ones and times it.

Needs numpy and onnxruntime alone. samples/ holds input_K.npy and output_K.npy for the K-th input and output of the model,
and the relative error that the outputs may have, tolerance.npy. Exit codes: 0 they are within it, 1 the model cannot be run,
2 usage, 3 they are not.
"""

import argparse
import json
import sys
import time
from pathlib import Path

try:
    import numpy as np
    import onnxruntime
except ImportError as error:
    raise SystemExit(f"run.py: error: {error}; pip install numpy onnxruntime") from None

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
WARMUP = 3


class RunError(Exception):
    """The model cannot be run; the message is one line."""


def open_session(folder, provider=None, threads=None):
    """An onnxruntime session of the model in `folder`, with the op library beside it.

    Args:
        provider: "cpu" or "cuda"; what the folder was made for when None.
        threads: intra-op threads; onnxruntime's choice when None.
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    least, found = manifest["min_onnxruntime"], onnxruntime.__version__
    if _version(found) < _version(least):
        raise RunError(f"onnxruntime {found} is too old, the model needs {least}: pip install -U onnxruntime")
    wanted = PROVIDERS[provider or manifest["provider"]]
    if wanted not in onnxruntime.get_available_providers():
        raise RunError(f"this onnxruntime has no {wanted}; it has {', '.join(onnxruntime.get_available_providers())}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and would be printed as well
    options.intra_op_num_threads = threads or 0
    options.register_custom_ops_library(str(folder / "lib" / "libqexport_ops.so"))
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=[wanted])
    if wanted not in session.get_providers():
        raise RunError(f"{wanted} did not start: its driver or libraries are missing")
    return session


def _version(text):
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


def read_samples(folder, session):
    """The stored inputs by name, the stored outputs in the session's order, and the relative error that is allowed."""
    samples = folder / "samples"
    inputs = {spec.name: np.load(samples / f"input_{k}.npy") for k, spec in enumerate(session.get_inputs())}
    outputs = [np.load(samples / f"output_{k}.npy") for k in range(len(session.get_outputs()))]
    return inputs, outputs, float(np.load(samples / "tolerance.npy"))


def relative_error(value, stored):
    """|value - stored| / |stored| (Frobenius); infinite where shapes, types or NaNs differ."""
    if value.shape != stored.shape or value.dtype != stored.dtype:
        return float("inf")
    value, stored = value.astype(np.float64), stored.astype(np.float64)
    same = (value == stored) | (np.isnan(value) & np.isnan(stored))
    with np.errstate(invalid="ignore"):
        difference = float(np.linalg.norm(np.where(same, 0, value - stored)))
    size = float(np.linalg.norm(np.where(np.isfinite(stored), stored, 0)))
    if difference == 0:
        return 0.0
    return difference / size if size and np.isfinite(difference) else float("inf")


def check(folder, provider=None, threads=None, runs=20, save=None):
    """Run the samples: errors of the outputs, whether all are within the tolerance, load and run times in milliseconds."""
    folder, start = Path(folder), time.perf_counter()
    session = open_session(folder, provider, threads)
    load = time.perf_counter() - start
    inputs, stored, tolerance = read_samples(folder, session)
    found = session.run(None, inputs)
    if save is not None:
        Path(save).mkdir(parents=True, exist_ok=True)
        for k, value in enumerate(found):
            np.save(Path(save) / f"output_{k}.npy", value)
    names = [spec.name for spec in session.get_outputs()]
    errors = {name: relative_error(*pair) for name, *pair in zip(names, found, stored, strict=True)}
    times = []
    for k in range(WARMUP + runs):
        start = time.perf_counter()
        session.run(None, inputs)
        if k >= WARMUP:
            times.append((time.perf_counter() - start) * 1e3)
    return {
        "onnxruntime": onnxruntime.__version__,
        "providers": session.get_providers(),
        "tolerance": tolerance,
        "errors": {name: error if error < float("inf") else None for name, error in errors.items()},
        "passed": all(error <= tolerance for error in errors.values()),
        "load_ms": load * 1e3,
        "runs": runs,
        "latency_ms": {f"p{q}": float(np.percentile(times, q)) for q in (50, 90, 99)} if times else None,
    }


def report(found):
    """The text of what `check` found."""
    lines = []
    for name, error in found["errors"].items():
        shown = "does not compare" if error is None else f"relative error {error:.2g}"
        lines.append(f"output {name}: {shown}, allowed {found['tolerance']:.2g}")
    if found["latency_ms"]:
        times = ", ".join(f"{name} {time:.3f} ms" for name, time in found["latency_ms"].items())
        lines.append(f"latency: {times}; {found['runs']} run{'s' * (found['runs'] != 1)}")
    lines.append("PASSED" if found["passed"] else "FAILED: the outputs are not the stored ones")
    return "\n".join(lines)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(prog="run.py", description="Run the model on its samples, compare and time it.")
    parser.add_argument("--provider", choices=list(PROVIDERS), help="where to run [what the folder was made for]")
    parser.add_argument("--threads", type=int, help="intra-op threads [onnxruntime's choice]")
    parser.add_argument("--runs", type=int, default=20, help="timed runs [20]")
    parser.add_argument("--save", metavar="FOLDER", help="write the outputs there, as output_K.npy")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.runs < 0 or (options.threads or 0) < 0:
        parser.error("--runs and --threads must not be negative")
    onnxruntime.set_default_logger_severity(4)
    folder = Path(__file__).resolve().parent
    try:
        found = check(folder, options.provider, options.threads, options.runs, options.save)
    except Exception as error:  # onnxruntime raises a dozen types, all straight from Exception
        sys.exit(f"run.py: error: {' '.join(str(error).split()) or type(error).__name__}")
    print(json.dumps(found) if options.json else report(found))
    sys.exit(0 if found["passed"] else 3)


if __name__ == "__main__":
    main()
