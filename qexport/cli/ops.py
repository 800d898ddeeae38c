"""qexport ops"""

import click

from qexport.cli import common_options, print_json


@click.command("ops")
@click.option("--markdown", is_flag=True, help="Print the page docs/ops.md.")
@common_options
def command(markdown, as_json, quiet, verbose):
    """List the ops of the domain com.qexport: inputs, outputs, attributes and fallback."""
    from qexport.documents import make_document
    from qexport.ops import DOMAIN, OPS, VERSION
    from qexport.ops.page import markdown_page, summary_lines

    if as_json:
        print_json(make_document("ops", {"domain": DOMAIN, "version": VERSION, "ops": [spec.to_dict() for spec in OPS]}))
    elif markdown:
        click.echo(markdown_page(), nl=False)
    else:
        click.echo("\n".join(summary_lines()))
