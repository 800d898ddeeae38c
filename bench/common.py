"""What the benchmarks share: the machine line, the JSON layout, tables, intervals and timing."""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

import numpy as np
import onnx

import qexport
from qexport.installed import onnxruntime
from qexport.ops import DOMAIN

SCHEMA_VERSION = 1


def parser(description: str, threads: str = "intra-op threads of onnxruntime", **defaults) -> argparse.ArgumentParser:
    """The options that every benchmark has, --json and --threads (of what), and its own numeric ones with their defaults."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arguments.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    arguments.add_argument("--threads", type=int, default=1, help=threads)
    for name, value in defaults.items():
        arguments.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return arguments


def machine(threads: int) -> dict:
    """Where and when the figures were measured."""
    return {
        "cpu": _cpu_model(),
        "logical_cpus": os.cpu_count(),
        "threads": threads,
        "onnxruntime": onnxruntime().__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "qexport": qexport.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    parts = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return f"{fields.get('model name', platform.machine())} ({', '.join(parts)})"


def report(name: str, threads: int, parameters: dict, tables: dict[str, list[dict]], file: str | None) -> None:
    """Print the machine line and the tables, and write them to `file` as JSON."""
    where = machine(threads)
    threads_used = f"{where['threads']} of {where['logical_cpus']} threads"
    print(f"{where['cpu']}, {threads_used}, onnxruntime {where['onnxruntime']}, {where['date']}")
    print(", ".join(f"{key} {value}" for key, value in parameters.items()))
    for title, rows in tables.items():
        print(f"\n{title}")
        print_table(rows)
    if file:
        content = {"schema_version": SCHEMA_VERSION, "benchmark": name, "machine": where, "parameters": parameters, **tables}
        Path(file).write_text(_json(content))


def _json(content: dict) -> str:
    """One line per key and per row of a table; floats to six digits."""

    def rounded(value):
        if isinstance(value, dict):
            return {key: rounded(one) for key, one in value.items()}
        return float(f"{value:.6g}") if isinstance(value, float) else value

    def text(value):
        if not isinstance(value, list):
            return json.dumps(rounded(value))
        return "[\n" + ",\n".join(f"  {json.dumps(rounded(row))}" for row in value) + "\n ]"

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {text(value)}" for key, value in content.items()) + "\n}\n"


def print_table(rows: list[dict]) -> None:
    """Rows of the same keys as aligned columns; None is an empty cell, and quartiles stand behind their median."""
    if not rows:
        return print("nothing to measure")
    columns = [key for key in rows[0] if not key.endswith(("_p25", "_p75"))]
    cells = [columns] + [[_with_quartiles(row, key) for key in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        )


def _with_quartiles(row: dict, key: str) -> str:
    low, high = row.get(f"{key}_p25"), row.get(f"{key}_p75")
    return _cell(row[key]) if low is None else f"{_cell(row[key])} [{_cell(low)} {_cell(high)}]"


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def mean_interval(values) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval by Student's t; the half width of one value is 0."""
    from scipy.stats import t

    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), 0.0
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def relative_error(found, reference) -> float:
    """Relative Frobenius error |found - reference| / |reference|, in float64."""
    reference = np.asarray(reference, dtype=np.float64)
    return float(np.linalg.norm(np.asarray(found, dtype=np.float64) - reference) / np.linalg.norm(reference))


def ratio(name: str, theirs: np.ndarray, ours: np.ndarray) -> dict:
    """Median over the rounds of their time over ours, with its quartiles: above 1 ours is faster."""
    low, median, high = (float(x) for x in np.percentile(theirs / ours, [25, 50, 75]))
    return {name: median, f"{name}_p25": low, f"{name}_p75": high}


def with_attributes(model: Path, output: Path, **attributes) -> Path:
    """A copy of `model` at `output` whose QuantumAttention nodes have these attributes; returns `output`."""
    proto = onnx.load(model)
    nodes = [node for node in proto.graph.node if (node.domain, node.op_type) == (DOMAIN, "QuantumAttention")]
    if not nodes:
        raise ValueError(f"{model} has no QuantumAttention node")
    for node in nodes:
        kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())
    onnx.save(proto, output)
    return output
