"""The ops on an NVIDIA GPU: every contender checked, then timed in turn with the others.

    python -m bench.cuda [--activations FILE] [--tables exact tree ...] [--seconds 140] [--quick] [--json FILE]

ceilings      what the card does at best, in the same run: bytes of a copy, products of large matrices
exact         QuantumAttention without sampling, through onnxruntime and torch, against the length
tree          `tree` on the activations of trained models: error and time; needs --activations (bench.cuda.activations)
strategies    the strategies that draw keys for each query
decode        one new token over a long past
rows          QuantumNoise and QuantumMeasure
trains        MPSDecode, MPSAttention, MPOLinear
failures      cases that failed or were left out, with the reason
goals         those of bench/goals.toml that are decided here

`us` is the time on the device between two events, medians with quartiles in brackets, `call_us` what a caller who waits for
the result needs. A column `x_...` says how many times as long the other one takes on the device: the median over the
rounds; above 1 this row is faster; `x_..._call` the same for who waits. Everything is bound in the device's memory; calls
take turns, each on another set of inputs, so that none is in the cache (`in_cache`: all sets together are). A contender
that cannot be made, fails or is wrong is not timed, and its `note` says why.
"""

import argparse
import functools
from pathlib import Path

import torch

from bench import common
from bench.attention import goals
from bench.cuda import runner
from bench.cuda.cases import TABLES, all_cases
from bench.cuda.measure import with_ceilings


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m bench.cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--activations", metavar="FILE", type=Path, help="as bench.cuda.activations writes it")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--seconds", type=float, default=140, help="what is not done by then is left out")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench.cuda: torch sees no NVIDIA GPU here; --device cpu --quick tries the program without one")
    parameters, tables = measured(
        arguments.tables, arguments.device, arguments.quick, arguments.activations, arguments.seconds
    )
    tables["goals"] = goals.judged(tables, "", file="cuda")
    common.report("cuda", 1, parameters, tables, arguments.json)


def measured(names, device: str, quick: bool, activations: Path | None, seconds: float) -> tuple[dict, dict]:
    """The parameters of the report, with the card and its ceilings, and the tables."""
    make_cases = functools.partial(all_cases, tuple(names), device, quick, activations)
    found, failures = runner.run(make_cases, device, seconds, functools.partial(print, flush=True))
    card = next(iter(found.pop("ceilings", [])), {})
    tables = {name: [with_ceilings(row, card) for row in rows] for name, rows in found.items()}
    return {"quick": quick} | card, tables | {"failures": failures}


if __name__ == "__main__":
    main()
