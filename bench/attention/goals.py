"""Holds measured tables against bench/goals.toml."""

import fnmatch
import json
import tomllib
from pathlib import Path

GOALS = Path(__file__).parents[1] / "goals.toml"
RESULTS = Path(__file__).parents[1] / "results"


def judged(tables: dict[str, list[dict]], isa: str, file: str | None = None) -> list[dict]:
    """One row per goal: the goal, what was measured, the verdict, and the row of the table that decides it.

    `file`: `tables` are fresh ones of that benchmark, and its own goals alone are judged.

    The verdict is "met", "missed", or says why there is none: no such row was measured, or not on this instruction set.
    """
    found = tomllib.loads(GOALS.read_text())["goal"]
    return [_judge(goal, tables, isa, file) for goal in found if file is None or goal.get("file") == file]


def _judge(goal: dict, tables: dict[str, list[dict]], isa: str, fresh: str | None) -> dict:
    least = "at_least" in goal
    limit = goal["at_least" if least else "at_most"]
    row = {"goal": goal["text"], "limit": f"{'>=' if least else '<='} {limit:g}", "measured": None}
    command = "python -m bench.attention"
    if "file" in goal:
        file = RESULTS / f"{goal['file']}.json"
        command = f"python -m bench.{goal['file']}"
        if fresh is None:
            tables = json.loads(file.read_text()) if file.is_file() else {}
    if isa not in goal.get("isa", [isa]):
        return row | {"verdict": f"needs {' or '.join(goal['isa'])}", "decided_by": "", "command": command}
    found = [r for r in tables.get(goal["table"], []) if matches(r, goal["where"]) and r.get(goal["value"]) is not None]
    if not found:
        return row | {"verdict": "not measured", "decided_by": "", "command": command}
    # The worst row of "at least" is the smallest, the best one the largest; of "at most" the other way round.
    smallest = least == (goal.get("pick", "worst") == "worst")
    decisive = (min if smallest else max)(found, key=lambda r: r[goal["value"]])
    value = decisive[goal["value"]]
    names = ("data", "strategy", "contender", "dtype", "n", "past", "density", "samples", "threads", "causal")
    words = ", ".join(f"{name} {decisive[name]}" for name in names if name in decisive)
    verdict = "met" if (value >= limit if least else value <= limit) else "missed"
    return row | {"measured": value, "verdict": verdict, "decided_by": words, "command": command}


def matches(row: dict, where: dict) -> bool:
    """Whether every column of `where` is as it says: equal, one of a list, within {min, max}, or like a pattern with *."""
    return all(name in row and _fits(row[name], wanted) for name, wanted in where.items())


def _fits(value, wanted) -> bool:
    if isinstance(wanted, dict):
        return wanted.get("min", value) <= value <= wanted.get("max", value)
    if isinstance(wanted, list):
        return any(_fits(value, one) for one in wanted)
    if isinstance(wanted, str):
        return fnmatch.fnmatchcase(str(value), wanted)
    return value == wanted
