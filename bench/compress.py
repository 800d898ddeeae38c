"""How small real models become, at what loss, and how fast they are then: `qexport compress` beside onnxruntime's int8.

    python -m bench.compress --threads 2 [--folder DIR] [--json FILE] [--plot FILE]

minilm, char_gpt, vit   size and loss of each contender. Bytes are those of whole files; `ratio` is of the classical file
                        over them. Nothing was fitted to the data that judges. `no_more_loss`: loses no more than any of
                        onnxruntime's int8; `x_int8_bytes`: how many times as many bytes the smallest of these takes. Those
                        `in int8` are compressed with --products int8.
latency                 their times in a stock onnxruntime, runs interleaved: `x_classical` and `x_int8` are how many times
                        as long the classical model and `onnxruntime int8` take; with `no_more_loss` from above
low_rank                a product with a 1024 x 1024 weight against factors of rank 64 (an eighth of its numbers), on one
                        thread too, as products of that size hardly gain by more
trains                  weights of MiniLM as tensor trains, as factors and as int4, at the same bytes
goals                   those of bench/goals.toml that are decided here

`onnxruntime int8` is quantize_dynamic of MatMul, Gemm and Gather. Without that list it makes a QAttention with an attribute
that onnxruntime does not know out of the Attention of opset 23, and its file does not load. With --folder the models are
kept there, and those that are there are not made again.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np

import qexport
from bench import common, compress_plot
from bench.attention import goals
from bench.compress_cases import CASES
from bench.compress_factors import low_rank_table, trains_table
from qexport import _core, runtime
from qexport.external_data import file_bytes
from qexport.profiling.calls import make_call
from qexport.profiling.timing import interleaved

CLASSICAL, INT8 = "classical", "onnxruntime int8"
IN_INT8 = ", in int8"
INT8_OPTIONS = {INT8: {}, f"{INT8}, per channel": {"per_channel": True}}


def made(case, folder: Path) -> dict[str, Path]:
    """The file of each contender, classical first; made where it is not there."""
    found = {}
    asked = [(ratio, "", {}) for ratio in case.ratios]
    asked += [(ratio, ", healed", {"heal": case.heal}) for ratio in case.healed]
    asked += [(ratio, IN_INT8, {"products": "int8"}) for ratio in case.in_int8]
    for ratio, kind, arguments in asked:
        contender = f"compress {ratio}x{kind}"
        bundle = folder / f"{case.name} {contender}"
        if not bundle.is_dir():
            options = {"findings": folder / "findings", "profile": False, **case.options, **arguments}
            qexport.compress(case.source, bundle, case.fitted(), ratio=ratio, **options)
        found.setdefault(CLASSICAL, bundle / "classical.onnx")
        found[contender] = bundle / "model.onnx"
    for name, options in INT8_OPTIONS.items():
        file = folder / f"{case.name} {name}.onnx"
        if not file.is_file():
            int8(found[CLASSICAL], file, **options)
        found[name] = file
    return found


def int8(model: Path, output: Path, **options) -> None:
    """onnxruntime's dynamic quantisation of a model."""
    from onnxruntime.quantization import quantize_dynamic

    half = output.with_suffix(".half")
    quantize_dynamic(model, half, op_types_to_quantize=["MatMul", "Gemm", "Gather"], **options)
    half.replace(output)


def front(case, files: dict[str, Path], threads: int) -> list[dict]:
    """Size and loss of each contender."""
    rows, classical, before = [], None, file_bytes(files[CLASSICAL])
    for contender, file in files.items():
        answer = case.answer(opened(file, threads))
        classical = answer if classical is None else classical
        size = file_bytes(file)
        row = {"contender": contender, "bytes": size, "ratio": before / size}
        rows.append(row | case.figures(answer, classical))
    theirs = [row for row in rows if row["contender"] in INT8_OPTIONS]
    least, smallest = min(row["loss"] for row in theirs), min(row["bytes"] for row in theirs)
    for row in rows:
        row |= {"no_more_loss": row["loss"] <= least, "x_int8_bytes": smallest / row["bytes"]}
    return rows


def latency(case, files: dict[str, Path], losses: list[dict], threads: int, runs: int) -> list[dict]:
    """Times of the contenders by the size of their inputs; `losses` is what `front` gave."""
    no_more_loss = {row["contender"]: row["no_more_loss"] for row in losses}
    sessions, rows = {name: opened(file, threads) for name, file in files.items()}, []
    for (batch, n), feed in case.feeds().items():
        calls = {}
        for name, session in sessions.items():
            known = {value.name for value in session.get_inputs()}
            calls[name] = make_call(session, {key: array for key, array in feed.items() if key in known}, [])
        times = interleaved(calls, runs, seconds=2.0, warmup=3)
        for name, taken in times.items():
            row = {"model": case.name, "contender": name, "batch": batch, "n": n, "ms": float(np.median(taken))}
            row["no_more_loss"] = no_more_loss[name]
            row |= common.ratio("x_classical", times[CLASSICAL], taken) | common.ratio("x_int8", times[INT8], taken)
            rows.append(row)
    return rows


def opened(file: Path, threads: int):
    """A session in a stock onnxruntime, whose threads sleep between runs: they would keep the cores from other models."""
    options = runtime.quiet_options(threads)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return runtime.session(file, library=False, options=options)


def main():
    parser = common.parser(__doc__.split("\n")[0], runs=20)
    parser.add_argument("--folder", metavar="DIR", type=Path, help="keep the models here, and use those that are here")
    parser.add_argument("--plot", metavar="FILE", help="draw size against loss, and times, to this file")
    arguments = parser.parse_args()
    scratch = arguments.folder or Path(tempfile.mkdtemp())
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        cases = [case() for case in CASES]
        files = {case.name: made(case, scratch) for case in cases}
        tables = {case.name: front(case, files[case.name], arguments.threads) for case in cases}
        tables["latency"] = [
            row
            for case in cases
            for row in latency(case, files[case.name], tables[case.name], arguments.threads, arguments.runs)
        ]
        tables["low_rank"] = [
            row | {"threads": threads}
            for threads in sorted({1, arguments.threads})
            for row in low_rank_table(scratch, threads)
        ]
        tables["trains"] = trains_table(files["minilm"][CLASSICAL])
    finally:
        if arguments.folder is None:
            shutil.rmtree(scratch)
    tables["goals"] = goals.judged(tables, _core.isa(), file="compress")
    if arguments.plot:
        compress_plot.draw(tables, {case.name: case.measure for case in cases}, arguments.plot)
    common.report("compress", arguments.threads, {"runs": arguments.runs}, tables, arguments.json)


if __name__ == "__main__":
    main()
