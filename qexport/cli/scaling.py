"""qexport scaling"""

import click

from qexport.cli import FILE, Numbers, common_options, print_json, provider_options


@click.command("scaling")
@click.option(
    "--lengths",
    type=Numbers(),
    default=(128, 256, 512, 1024, 2048, 4096, 8192),
    metavar="N,...",
    help="Numbers of queries and keys [128 to 8192, doubling].",
)
@click.option("--heads", type=click.IntRange(1), default=4, show_default=True, help="Heads.")
@click.option("--head-size", type=click.IntRange(1), default=64, show_default=True, help="Head size of random inputs.")
@click.option("--causal", is_flag=True, help="Query i sees the keys up to i alone.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of onnxruntime and torch.")
@click.option("--strategies", metavar="NAME,...", help="Strategies of the op, and names of what they meet [all].")
@click.option("--activations", type=FILE, help="An .npz with arrays q, k, v, (..., n, head size) each [random].")
@click.option(
    "--seconds",
    type=float,
    default=5.0,
    show_default=True,
    metavar="S",
    help="What one contender may take at one length; who needs more is stopped there.",
)
@click.option("--plot", type=FILE, help="Draw it to a .png, .svg or .pdf; needs matplotlib.")
@provider_options
@common_options
def command(strategies, as_json, quiet, verbose, **options):
    """Measure time, memory and error of attention against the length, and fit time ~ n^a with its interval.

    Every strategy of QuantumAttention, onnxruntime's and torch's exact attentions, and other approximations (Performer,
    Linformer, top-k, uniform sampling) take turns on the same inputs. Memory is what a call needs beside its inputs and its
    output; errors are held against float64. It takes some two minutes; fewer lengths or strategies take less.
    """
    from qexport.cli.render_scaling import show_scaling
    from qexport.cli.text import progress_bar
    from qexport.scaling import sweep

    names = None if strategies is None else strategies.split(",")
    with progress_bar(quiet or as_json) as progress:
        report = sweep(strategies=names, progress=progress, **options)
    if as_json:
        print_json(report.to_dict())
    else:
        show_scaling(report, verbose)
