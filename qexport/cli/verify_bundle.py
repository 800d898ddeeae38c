"""qexport verify-bundle"""

import click

from qexport.cli import DIR, OUT_OF_TOLERANCE, common_options, print_json


@click.command("verify-bundle")
@click.argument("deployment", type=DIR, metavar="DIR")
@click.option("--runs", type=click.IntRange(1), default=20, show_default=True, help="Timed runs of the model.")
@common_options
def command(deployment, runs, as_json, quiet, verbose):
    """Check a deployment that `qexport bundle` packed: every file by its sha256, and the outputs on its samples.

    A file that changed, is missing or was added is named. Exit code 3 when outputs are out of tolerance.
    """
    from qexport.cli.render_deployment import show_verification
    from qexport.cli.text import progress_bar
    from qexport.deployment import verify_deployment

    with progress_bar(quiet or as_json) as progress:
        report = verify_deployment(deployment, runs=runs, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        show_verification(report)
    raise click.exceptions.Exit(0 if report.passed else OUT_OF_TOLERANCE)
