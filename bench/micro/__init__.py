"""Micro-benchmarks of the kernels and the peaks of the machine: a small C++ program, built on demand.

    python -m bench.micro [--json FILE]

Needs the source tree, CMake and a C++ compiler, as building qexport from source does. The program holds the kernels of the
instruction set that qexport uses here (QEXPORT_ISA chooses another), compiled with their own flags. Cycles are those of the
core, whose frequency is measured with a chain of dependent additions.
"""

import json
import subprocess
from functools import cache
from pathlib import Path

from qexport import _core
from qexport.errors import QexportError

SOURCE = Path(__file__).parent
BUILD = SOURCE.parents[1] / "build" / "micro"


@cache
def results() -> tuple[dict[str, float], list[dict]]:
    """(peaks, rows). `peaks`: clock_ghz, fp32_gflops and where there is one bf16_gflops and int8_gops, of one core, and
    "read_gb_per_s N" of N threads. `rows`: name, unit, ns and cycles per unit.

    Raises:
        QexportError: the program cannot be built or run; the message says why.
    """
    target = f"micro_{_core.isa()}"
    _run(["cmake", "-S", str(SOURCE), "-B", str(BUILD)])
    _run(["cmake", "--build", str(BUILD), "--target", target])
    lines = [json.loads(line) for line in _run([str(BUILD / target)]).splitlines()]
    return {line["peak"]: line["value"] for line in lines if "peak" in line}, [line for line in lines if "name" in line]


def peak_rows(peaks: dict[str, float]) -> list[dict]:
    """The peaks as a table."""
    return [{"peak": name, "value": value} for name, value in peaks.items()]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise QexportError(f"the micro-benchmarks need {command[0]}: {error}") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines() or ["nothing"]
        raise QexportError(f"{' '.join(command)} ended with {error.returncode}: {said[-1]}") from error
    return done.stdout
