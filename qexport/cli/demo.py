"""qexport demo"""

import click

from qexport.cli import DIR, common_options, print_json, provider_options


@click.command("demo")
@click.option("-o", "--output", default="qexport_demo", show_default=True, type=DIR, help="Folder of the bundle.")
@provider_options
@common_options
def command(output, as_json, quiet, verbose, **options):
    """Convert a real MiniLM, validate it on English sentences, profile it, and print one table."""
    from qexport.cli.render import show_demo
    from qexport.cli.text import progress_bar
    from qexport.demo import demo

    with progress_bar(quiet or as_json) as progress:
        report = demo(output, progress=progress, **options)
    if as_json:
        print_json(report.to_dict())
    else:
        show_demo(report, verbose)
    raise click.exceptions.Exit(0 if report.validation.passed else 3)
