"""qexport demo"""

import click

from qexport.cli import common_options, print_json


@click.command("demo")
@click.option("-o", "--output", default="qexport_demo", show_default=True, metavar="DIR", help="Folder of the bundle.")
@common_options
def command(output, as_json, quiet, verbose):
    """Convert a real MiniLM, validate it on English sentences, profile it, and print one table."""
    from qexport.cli.render import show_demo
    from qexport.cli.text import progress_line
    from qexport.demo import demo

    report = demo(output, progress=progress_line(quiet or as_json))
    if as_json:
        print_json(report.to_dict())
    else:
        show_demo(report, verbose)
    raise click.exceptions.Exit(0 if report.validation.passed else 3)
