"""Pieces of Markdown that the figures are made of."""

import json
from pathlib import Path

RESULTS = Path(__file__).with_name("results")


def load(name: str) -> dict:
    """The results file of one benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: tuple, rows: list[tuple], words: bool = False) -> str:
    """A table of numbers behind a first column of names; `words`: its other columns are read, not compared."""
    lines = [header, ("---",) + ("---" if words else "---:",) * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def paragraph(text: str) -> str:
    """Wrapped source text as one Markdown paragraph, below a heading where its first line is one."""
    first, _, rest = text.strip().partition("\n")
    if first.startswith("#"):
        return f"{first}\n\n" + (paragraph(rest) if rest else "")
    return " ".join(text.split()) + "\n\n"


def source(name: str, results: dict) -> str:
    where = results["machine"]
    threads = f"{where['threads']} thread" + "s" * (where["threads"] > 1)
    return f"({where['cpu']}, {threads}, onnxruntime {where['onnxruntime']}, `python -m bench.{name}`)"


def percent(fraction: float) -> str:
    """0.386 -> 38.6 %; below a millionth it is rounding, and said so by its size."""
    return f"{100 * fraction:.1f} %" if fraction > 1e-6 else f"{fraction:.0e}"


def times(ratio: float | None) -> str:
    return f"{ratio:.2f} ×" if ratio else ""
