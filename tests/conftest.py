"""Makes `bench` importable for the tests that use it, last on the path, so that the installed qexport is what is tested,
and runs the command line for tests. Where tests share the machine (`-n`), each has one thread of OpenMP:
read before torch is."""

import functools
import gc
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from fake_gpu import fake_gpu  # noqa: F401  (a fixture)
from ssh_server import pythons, server, target  # noqa: F401

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a script's `&` starts it: Ctrl-C would not reach what is tested
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.append(str(Path(__file__).parent.parent))


@pytest.fixture(scope="module", autouse=True)
def _nothing_old_to_collect():
    """Garbage is looked for in what a module makes, not in what others left: a million objects of torch and transformers,
    half a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _sources_are_read_once():
    """torch's exporter parses the source of each of the thousand functions of torchlib for every export, for a second."""
    values = sys.modules.get("onnxscript._internal.values")
    if values and isinstance(values.TracedOnnxFunction.function_ir, property):
        once = functools.cached_property(values.TracedOnnxFunction.function_ir.fget)
        once.__set_name__(values.TracedOnnxFunction, "function_ir")
        values.TracedOnnxFunction.function_ir = once


@pytest.fixture(autouse=True)
def _draws_of_its_own():
    """What a test draws from torch's own generator does not depend on the tests before it."""
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(0)


@pytest.fixture(scope="module")
def module_path(tmp_path_factory):
    """A folder for what the tests of a module share, removed behind them: real models are hundreds of megabytes."""
    folder = tmp_path_factory.mktemp("module")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def qexport(capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    from qexport.cli import main

    def run(*argv):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def lm(tmp_path_factory):
    """The file of a language model whose weights are large enough to be compressed."""
    from compression_cases import language_model

    return language_model(tmp_path_factory.mktemp("lm") / "lm.onnx")
