"""All cases of `bench.cuda`, in the order in which they run."""

from pathlib import Path

from bench.cuda import attention, measure, ops
from bench.cuda.models import load
from bench.cuda.runner import Case

TABLES = ("ceilings", "exact", "tree", "strategies", "decode", "rows", "trains")


def card(device: str) -> list[dict]:
    """One row: the card, its driver and programs, and its ceilings in this run."""
    return [measure.describe(device) | measure.ceilings(device)]


def all_cases(tables, device: str, quick: bool, activations: Path | None) -> list[Case]:
    """The cases of `tables`; without a file of activations there are none of `tree`."""
    found = [Case("ceilings", "copy and products", card)]
    found += attention.cases(device, quick, load(activations) if activations else [])
    found += ops.cases(device, quick)
    return [case for case in found if case.table in ("ceilings", *tables)]
