"""qexport tune"""

import click

from qexport.cli import DIR, FILE, OUT_OF_TOLERANCE, Share, common_options, print_json, provider_options


@click.command("tune")
@click.argument("bundle", type=DIR, metavar="DIR")
@click.option("--max-error", type=Share(), required=True, help="Relative error allowed at the model's outputs: 0.01 or 1%.")
@click.option(
    "--data", type=FILE, help="Inputs: .npz with an array per input, or .txt with a text per line [stored samples]."
)
@click.option("--seq", type=click.IntRange(1), help="Sequence length of generated inputs; texts are cut to it.")
@click.option("--batch", type=click.IntRange(1), help="Items per run; generates inputs when there is no --data.")
@click.option("--trials", type=click.IntRange(1), default=20, show_default=True, help="Recipes tried in the whole model.")
@click.option("--time", type=float, metavar="S", help="Begin no further trial after so many seconds [no limit].")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each recipe that samples.")
@click.option("--threads", type=click.IntRange(1), help="Intra-op threads [onnxruntime's choice].")
@click.option(
    "-o",
    "--output",
    type=FILE,
    metavar="PATH",
    help="Folder of a new bundle with the recipe, or .yaml file for the recipe.",
)
@provider_options
@common_options
def command(bundle, as_json, quiet, verbose, **options):
    """Find the fastest recipe for the bundle in DIR whose outputs differ from the classical model's by E at most.

    Every attention is measured once under some twenty settings (precision, keys read, tolerance, sampling); errors and times
    add up, so each then gets the setting that pays most, and the best few recipes are tried in the model itself. Times are
    this machine's: run it where the model will run, with inputs like those it will see.

    Exit code 3 when no recipe holds E; nothing is written then.
    """
    from qexport.cli.render_tuning import show_tuning
    from qexport.cli.text import progress_bar
    from qexport.tuning import tune

    with progress_bar(quiet or as_json) as progress:
        report = tune(bundle, progress=progress, **options)
    if as_json:
        print_json(report.to_dict())
    else:
        show_tuning(report, verbose)
    raise click.exceptions.Exit(0 if report.passed else OUT_OF_TOLERANCE)
