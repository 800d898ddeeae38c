"""qexport compress"""

import click

from qexport.cli import DIR, FILE, OUT_OF_TOLERANCE, Share, common_options, print_json


@click.command("compress")
@click.argument("model", type=FILE)
@click.option("-o", "--output", required=True, type=DIR, help="Folder of the new bundle.")
@click.option("--ratio", type=float, metavar="R", help="File of the classical model over the compressed one, such as 8.")
@click.option("--max-drop", type=Share(), help="Largest loss of the metric; the smallest file within it [1%].")
@click.option(
    "--data", type=FILE, help="Inputs: .npz with an array per input, or .txt with a text per line [stored samples]."
)
@click.option("--methods", metavar="M,...", help="Of fp16, int8, trellis, int4, low-rank, mpo [all].")
@click.option(
    "--products",
    type=click.Choice(["float", "int8"]),
    help="What products are computed in: int8 is faster on CPUs, for half of the loss that is allowed at most [float].",
)
@click.option(
    "--heal", type=click.IntRange(0), metavar="STEPS", help="Distil so many steps behind it; torch models only [0]."
)
@click.option("--config", type=FILE, help="Recipe in YAML with the key compress; options given here win over it.")
@click.option("--metric", type=click.Choice(["perplexity", "top1", "cosine"]), help="What is lost [by the model].")
@click.option("--batch", type=click.IntRange(1), help="Items per run; generates inputs when there is no --data.")
@click.option("--seq", type=click.IntRange(1), help="Sequence length of generated inputs; texts are cut to it.")
@click.option("--task", help="Which head of a Hugging Face model [feature-extraction].")
@click.option("--opset", type=click.IntRange(17, 24), help="Opset of the file, unless MODEL is a bundle [23].")
@click.option("--findings", type=DIR, help="Keep here what was found, for other ratios of this model.")
@click.option("--profile/--no-profile", default=True, help="Also measure latency and memory of both models [yes].")
@common_options
def command(model, config, as_json, quiet, verbose, **options):
    """Make the weights of MODEL small, at a loss that is asked for and measured.

    Every weight is stored as int8, int4, strings of a trellis, low-rank factors or a matrix product operator, whichever
    costs the model least for its bytes, as measured on your data. The file runs in a stock onnxruntime. A quarter of the
    data judges what the rest was fitted to.

    MODEL is a bundle, whose attention stays as it is, or what `qexport convert` takes, whose attention stays classical
    unless --config samples it. A run that was stopped goes on where it was when the same command is given again.

    Exit code 3 when the ratio or the loss cannot be reached; the nearest that can is written.
    """
    from qexport.cli.render_compression import show_compression
    from qexport.cli.text import progress_bar
    from qexport.compression import compress

    with progress_bar(quiet or as_json) as progress:
        report = compress(model, recipe=config, progress=progress, **options)
    if as_json:
        print_json(report.to_dict())
    else:
        show_compression(report, verbose)
    raise click.exceptions.Exit(0 if report.passed else OUT_OF_TOLERANCE)
