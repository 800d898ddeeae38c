"""Inputs for a third-party graph: generated, run, and the longest sequence that it takes found by running it."""

from pathlib import Path

import numpy as np

from qexport.bundle import Bundle
from qexport.conversion_checks import Runner
from qexport.errors import QexportError
from qexport.generated import dimension_sizes, generate
from qexport.rewrite.classical import RUNTIME_DOMAIN, RUNTIME_REASONS
from qexport.rewrite.graph import is_op
from qexport.sources.source import Source
from qexport.sources.specs import tables

# (batch, size of the other dynamic axes), tried in turn: text runs at the first, which is longer than the 32 keys that a
# query samples by default; short tables need less, images and waves more.
TRIALS = ((2, 64), (2, 16), (2, 224), (2, 1024), (2, 16000), (1, 64), (1, 16), (1, 224))
SHORTEST_LIMIT = 8
LARGEST_FEED = 1 << 23
# Position tables longer than this are not tried: attention at that length takes seconds and gigabytes.
LONGEST_TRIED = 1100


def make_examples(source: Source, path: Path) -> None:
    """Fill in `examples`, `expected` and, where a position table ends, `limits` of the source in `path`.

    Raises:
        QexportError: an input cannot be made up, or onnxruntime cannot run the file on any of the trial sizes.
    """
    runner = Runner(path)
    problem = None
    for batch, sequence in TRIALS if _is_dynamic(source) else TRIALS[:1]:
        feeds = _generate(source, batch, sequence)
        if sum(array.size for array in feeds.values()) > LARGEST_FEED:
            continue
        try:
            source.expected = runner(feeds)
        except QexportError as error:
            problem = problem or error
            continue
        source.examples = feeds
        if batch == 1 and _is_dynamic(source):
            source.notes.append("runs with a batch of 1 only on generated inputs; give real ones to validate and profile")
        _measure_limit(source, runner)
        return
    if any(is_op(node, "Attention") for node in source.model.graph.all_nodes()):
        # runtimes refuse some masks of Attention that the standard allows; the classical form has them spelled out
        source.examples = _generate(source, *TRIALS[0])
        source.notes.append(f"not compared with the source, which this onnxruntime does not run: {problem}")
        return
    raise QexportError(f"{path}: onnxruntime cannot run it on generated inputs: {problem}") from problem


def _is_dynamic(source: Source) -> bool:
    return any(isinstance(dim, str) for spec in source.inputs for dim in spec.shape)


def _generate(source: Source, batch: int, sequence: int) -> dict[str, np.ndarray]:
    for spec in source.inputs:
        if spec.kind in ("token_ids", "integer") and not spec.high:
            raise QexportError(f"{source.name}: {_why_unknown(source, spec.name)}")
    manifest = {"inputs": [spec.to_dict() for spec in source.inputs], "limits": source.limits}
    lengths = {name: size for name, size in source.limits.items() if size < sequence}
    sizes = dimension_sizes(manifest, batch, sequence, lengths)
    return generate(Bundle(Path(source.name), manifest), batch=batch, seq=sequence, dims=sizes).feeds[0]


def _why_unknown(source: Source, name: str) -> str:
    """Why an integer input cannot be made up, and what to do."""
    value = next(value for value in source.model.graph.inputs if value.name == name)
    for op in (use.node.op_type for use in value.uses() if use.node.domain == RUNTIME_DOMAIN):
        if op in RUNTIME_REASONS:
            return f"the integer input {name!r} goes to {op}, which is left alone: {RUNTIME_REASONS[op]}"
    return (
        f"the values that the integer input {name!r} may have are not told by the graph (it picks from no table); export it "
        "as a constant or convert the torch module"
    )


def _measure_limit(source: Source, runner: Runner) -> None:
    """The longest sequence of token ids, where a table of about that many rows (of positions) ends it."""
    axes = {spec.shape[1] for spec in source.inputs if spec.kind == "token_ids" and len(spec.shape) == 2}
    axes = [axis for axis in axes if isinstance(axis, str) and axis.isidentifier() and axis not in source.limits]
    lengths = sorted({rows for rows in tables(source.model) if SHORTEST_LIMIT < rows <= LONGEST_TRIED})
    if len(axes) != 1 or not lengths:
        return

    def runs(length: int) -> bool:
        feeds = _generate(source, 1, length)
        for spec in source.inputs:
            if spec.kind == "token_ids":  # one real token throughout: padding ids may not count as positions
                feeds[spec.name][...] = spec.high - 1
        try:
            runner(feeds)
        except QexportError:
            return False
        return True

    for rows in lengths:
        if runs(rows + 1):
            continue
        good, bad = SHORTEST_LIMIT, rows + 1
        for near in range(rows, max(rows - 4, good), -1):  # position ids start at 0, 1 or behind a padding id
            if runs(near):
                good = near
                break
            bad = near
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if runs(middle) else (good, middle)
        source.limits[axes[0]] = good
        return
