"""qexport report"""

import click

from qexport.cli import DIR, FILE, OUT_OF_TOLERANCE, Numbers, Share, common_options, print_json, provider_options


@click.command("report")
@click.argument("bundle", type=DIR, metavar="DIR")
@click.option("-o", "--output", required=True, type=FILE, help="The page, an .html file.")
@click.option(
    "--data", type=FILE, help="Inputs: .npz with an array per input, or .txt with a text per line [stored samples]."
)
@click.option(
    "--reuse",
    multiple=True,
    type=FILE,
    help="What validate, profile, scaling, tune or report printed with --json; repeatable. That is not measured again.",
)
@click.option(
    "--skip",
    multiple=True,
    type=click.Choice(["validate", "profile", "samples", "scaling", "all"]),
    help="Do not measure this; repeatable. Its section says which command does.",
)
@click.option("--seq", type=Numbers(), help="Lengths that are timed [32 to 512, doubling].")
@click.option("--runs", type=click.IntRange(1), default=30, show_default=True, help="Timed runs per model and length.")
@click.option("--seeds", type=click.IntRange(1, 10000), default=5, show_default=True, help="Runs of the sampled model.")
@click.option("--max-error", type=Share(), help="Relative error allowed at the model's outputs [what the recipe allows].")
@click.option("--threads", type=click.IntRange(1), help="Threads of what is timed [onnxruntime's choice].")
@provider_options
@common_options
def command(bundle, as_json, quiet, verbose, **options):
    """Write one page on the bundle in DIR, which needs no network: verdict, accuracy, error against samples, latency, time
    by op, memory, size, environment, recipe, and the commands that reproduce it.

    What is not given with --reuse is measured now, which takes a minute for a small model. For settings that are not here,
    such as batch sizes, run `qexport profile --json` with them and reuse its file. Exit code 3 when the error is out of
    tolerance; the page is written all the same.
    """
    from qexport.cli.render_report import show_report
    from qexport.cli.text import progress_bar
    from qexport.reporting import report

    with progress_bar(quiet or as_json) as progress:
        found = report(bundle, progress=progress, **options)
    if as_json:
        print_json(found.to_dict())
    else:
        show_report(found)
    raise click.exceptions.Exit(OUT_OF_TOLERANCE if found.passed is False else 0)
