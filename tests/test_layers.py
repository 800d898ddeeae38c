"""Import rules: what may be imported where. Run in fresh interpreters, where the forbidden modules cannot be found."""

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "transformers",
    "onnxscript",
    "onnx_ir",
    "pydantic",
    "ruamel.yaml",
    "rich",
    "psutil",
    "tokenizers",
    "click",
)

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in {blocked!r} or name.startswith(tuple(b + "." for b in {blocked!r})):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
{code}
"""


def run(code, blocked=()):
    script = BLOCK.format(blocked=tuple(blocked), code=code)
    return subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "module",
    [
        "qexport",
        "qexport.runtime",
        "qexport.bundle",
        "qexport.data",
        "qexport.validation",
        "qexport.memory",
        "qexport.profiling",
        "qexport.inspection",
    ],
)
def test_using_a_bundle_needs_numpy_onnx_onnxruntime_alone(module):
    done = run(f"import {module}", blocked=HEAVY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["qexport", "qexport.ops", "qexport.ops.page", "qexport.errors"])
def test_the_op_table_needs_the_standard_library_alone(module):
    done = run(f"import {module}", blocked=(*HEAVY, "numpy", "onnx", "onnxruntime"))
    assert done.returncode == 0, done.stderr


def test_compressing_needs_neither_torch_nor_a_terminal():
    done = run(
        "import qexport.compression, qexport.compression.job",
        blocked=("torch", "transformers", "tokenizers", "click", "rich"),
    )
    assert done.returncode == 0, done.stderr


def test_torch_modules_need_torch_alone():
    """To import, to train and to run them."""
    names = [name for name in HEAVY if name not in ("torch", "psutil")] + ["onnx", "onnxruntime", "ml_dtypes"]
    code = f"""
import torch
from qexport.nn import QuantumMultiheadAttention
x = torch.randn(2, 9, 8, requires_grad=True)
for backend in ("kernel", "reference"):
    module = QuantumMultiheadAttention(8, 2, num_samples=3, batch_first=True, backend=backend)
    module(x, x, x)[0].sum().backward()
print([name for name in {names} if name in sys.modules])
"""
    done = run(code)
    assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr


def test_qexport_itself_does_not_load_its_torch_modules():
    done = run("import qexport; print([n for n in sys.modules if n == 'torch' or n.startswith('qexport.nn')])")
    assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr


def test_the_command_line_loads_nothing_heavy_for_help():
    code = """
from qexport.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
print([name for name in ("torch", "onnx", "numpy", "onnxruntime", "rich", "pydantic") if name in sys.modules])
"""
    done = run(code)
    assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr


@pytest.mark.parametrize("extra", ["qiskit", "pennylane"])
def test_a_backend_without_its_extra_says_so_in_one_line(extra):
    """The circuit itself, and its OpenQASM 3, need neither package."""
    code = f"""
import torch
from qexport.hardware import to_qasm3
from qexport.nn.backends import get_backend
assert "h q;" in to_qasm3(torch.full((5,), 0.2), basis="x")
try:
    get_backend("{extra}")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = run(code, blocked=("qiskit", "qiskit_aer", "pennylane"))
    where = f"backend '{extra}' (qexport.hardware.{extra}:backend) cannot be loaded"
    assert done.stdout == f"QexportError {where}: blocked: {extra}; pip install 'qexport[{extra}]'\n", done.stderr
