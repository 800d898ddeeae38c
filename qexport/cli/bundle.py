"""qexport bundle"""

import click

from qexport.cli import DIR, FILE, Provider, common_options, print_json


@click.command("bundle")
@click.argument("bundle", type=DIR, metavar="DIR")
@click.option(
    "-o", "--output", required=True, type=DIR, metavar="OUT", help="Folder of the deployment; an old one is replaced."
)
@click.option("--target", metavar="NAME", help="linux-x86_64 or linux-aarch64 [this machine].")
@click.option("--provider", type=Provider(), default="cpu", show_default=True, help="What runs it there: cpu or cuda.")
@click.option(
    "--library", type=FILE, help="A wheel of qexport, or a libqexport_ops.so, for another target [the installed one]."
)
@common_options
def command(bundle, output, target, provider, library, as_json, quiet, verbose):
    """Pack what a device needs to run the bundle in DIR, without qexport: a deployment.

    OUT holds the model, the op library for the target, samples with the model's outputs, run.py (needs numpy and onnxruntime
    alone), a C++ program that does the same, and a manifest with the sha256 of every file.
    """
    from qexport.cli.render_deployment import show_deployment
    from qexport.cli.text import progress_bar
    from qexport.deployment import pack_deployment
    from qexport.documents import make_document

    with progress_bar(quiet or as_json) as progress:
        manifest = pack_deployment(bundle, output, target=target, provider=provider, library=library, progress=progress)
    if as_json:
        print_json(make_document("bundle", manifest))
    else:
        show_deployment(output, manifest)
