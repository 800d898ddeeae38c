"""qexport inspect"""

import click

from qexport.cli import FILE, common_options, print_json


@click.command("inspect")
@click.argument("path", type=FILE)
@common_options
def command(path, as_json, quiet, verbose):
    """Show what a bundle or an .onnx file contains: opset, ops, attentions and their recipe, size."""
    from qexport.cli.render_inspection import show_inspection
    from qexport.inspection import inspect

    found = inspect(path)
    if as_json:
        print_json(found)
    else:
        show_inspection(found, verbose)
