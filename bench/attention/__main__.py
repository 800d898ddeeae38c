"""Attention on the CPU: every contender checked against float64, then timed in turn with the others.

    python -m bench.attention [--quick] [--tables prefill decode ...] [--threads 1 2] [--json FILE] [--plot FILE]

prefill       time against the length, Gaussian inputs: QuantumAttention (exact in each precision, tree), onnxruntime's
              MultiHeadAttention, Attention and GroupQueryAttention, torch's scaled_dot_product_attention
decode        one new token over a long past, heads grouped or not, and on trained activations
activations   error and time on trained activations, with Performer, Linformer, top-k and uniform sampling beside ours
certificate   what `tree` says of its own error, against the error
steps         the same of single steps of decoding
gaussian      errors on Gaussian inputs beside the bound that no estimator can beat
micro         peaks of the machine and the parts of the kernels, in cycles; needs CMake and a compiler
goals         bench/goals.toml, held against the tables above

Times are medians with their quartiles in brackets. A column `x_...` says how many times as long the other one takes: the
median over the rounds of its time over this row's, so above 1 this row is faster; a round runs each contender once. Ours and
com.microsoft's operators get heads merged (3-D), Attention and torch 4-D, as the row "exact fp32, 4-D" does.
"""

import argparse
import os
import sys
import time

# torch's idle threads must not spin while another contender is timed; read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from bench import common, micro
from bench.attention import decode, goals, plot, prefill, quality
from qexport import _core
from qexport.errors import QexportError

TABLES = ("prefill", "decode", "activations", "certificate", "steps", "gaussian", "micro")
FULL = {
    "lengths": tuple(prefill.HEADS),
    "pasts": (1024, 4096, 16384, 65536),
    "more_pasts": (16384,),
    "sets": (
        *(f"minilm-{n}" for n in (512, 2048, 4096, 16384)),
        *("vit-1370", "whisper-1500", "stories-256", "stories-2048"),
    ),
    "held_out": ("minilm-2048-held-out", "vit-1370", "stories-2048"),
    "long_held_out": ("minilm-16384-held-out", "stories-16384-held-out"),
    "gaussian": (512, 2048),
    "seconds": 1.0,
    "least": 5,
    "least_of_sets": 3,
}
QUICK = {
    "lengths": (128, 512),
    "pasts": (1024,),
    "more_pasts": (),
    "sets": ("minilm-256", "stories-256"),
    "held_out": ("minilm-256",),
    "long_held_out": ("minilm-2048",),
    "gaussian": (512,),
    "seconds": 0.2,
    "least": 2,
    "least_of_sets": 1,
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        "python -m bench.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds, to see that it runs")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--plot", metavar="FILE", help="also draw them: a .png or .svg")
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of the calling thread, for a shared machine; one thread"
    )
    arguments = parser.parse_args(argv)
    if arguments.cpu_time and arguments.threads != [1]:
        parser.error("--cpu-time sees the calling thread alone: give --threads 1")
    tables = measured(arguments.tables, QUICK if arguments.quick else FULL, arguments.threads, arguments.cpu_time)
    tables["goals"] = goals.judged(tables, _core.isa())
    clock = "processor time of the thread" if arguments.cpu_time else "wall clock"
    parameters = {"isa": _core.isa(), "clock": clock, "quick": arguments.quick}
    common.report("attention", max(arguments.threads), parameters, tables, arguments.json)
    if arguments.plot:
        plot.draw(tables, arguments.plot)


def measured(names, sizes: dict, threads: list[int], cpu_time: bool) -> dict[str, list[dict]]:
    """The tables `names`; those of error and time together use the most threads, prefill and decode each number of them."""
    clock = time.thread_time if cpu_time else time.perf_counter
    timing = {"seconds": sizes["seconds"], "least": sizes["least"], "clock": clock}
    most = max(threads)
    peaks, kernels = {}, []
    try:
        peaks, kernels = micro.results()
    except QexportError as error:
        print(f"No peaks and no micro-benchmarks: {error}")
    makers = {
        "prefill": lambda: prefill.table(sizes["lengths"], threads, peaks=peaks, **timing),
        "decode": lambda: decode.table(sizes["pasts"], threads, peaks=peaks, more=sizes["more_pasts"], **timing),
        "activations": lambda: quality.table(sizes["sets"], most, **timing | {"least": sizes["least_of_sets"]}),
        "certificate": lambda: quality.certificate(sizes["held_out"], most),
        "steps": lambda: decode.certificate(sizes["long_held_out"], most),
        "gaussian": lambda: quality.gaussian(sizes["gaussian"], most),
        "micro": lambda: kernels,
    }
    tables = {}
    for name in TABLES:
        if name in names:
            start = time.perf_counter()
            tables[name] = makers[name]()
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if peaks:
        tables["peaks"] = micro.peak_rows(peaks)
    return tables


if __name__ == "__main__":
    main()
