"""qexport compare"""

import click

from qexport.cli import FILE, OUT_OF_TOLERANCE, Share, common_options, print_json


@click.command("compare")
@click.argument("before", type=FILE, metavar="A.json")
@click.argument("after", type=FILE, metavar="B.json")
@click.option("--threshold", type=Share(), default=0.05, help="Changes up to this share of A's figure never count [5%].")
@common_options
def command(before, after, threshold, as_json, quiet, verbose):
    """Compare two documents that qexport printed with --json: what changed from A to B, and is anything worse?

    Takes validate, profile, scaling, tune, compress, resilience, inspect, report and demo. A figure is worse when it changed
    by more than the threshold and by more than its noise: the confidence intervals, percentiles and quartiles that the files
    hold. Without --verbose only figures that changed are shown.

    Exit code 3 when a figure is worse, 2 when the files cannot be compared.
    """
    from qexport.cli.render_report import show_comparison
    from qexport.comparison import compare

    found = compare(before, after, threshold=threshold)
    if as_json:
        print_json(found.to_dict())
    else:
        show_comparison(found, verbose)
    raise click.exceptions.Exit(0 if found.passed else OUT_OF_TOLERANCE)
