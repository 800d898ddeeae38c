"""qexport attention"""

import click

from qexport.cli import DIR, FILE, Numbers, common_options, print_json, provider_options


@click.command("attention")
@click.argument("bundle", type=DIR, metavar="DIR")
@click.option("--text", "texts", multiple=True, help="A text to look at; may be given several times.")
@click.option(
    "--data", type=FILE, help="Inputs: .npz with an array per input, or .txt with a text per line [stored samples]."
)
@click.option("-o", "--output", required=True, type=DIR, metavar="FOLDER", help="For attention.html and the pictures.")
@click.option("--layers", type=Numbers(0), help="Numbers of the attentions, from 0 [all].")
@click.option("--heads", type=Numbers(0), help="Numbers of the query heads, from 0 [all].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampled model.")
@click.option("--seq", type=click.IntRange(1), help="Sequence length of generated inputs; texts are cut to it.")
@click.option("--no-pictures", is_flag=True, help="The page alone; needs no matplotlib.")
@provider_options
@common_options
def command(bundle, texts, data, no_pictures, as_json, quiet, verbose, **options):
    """Draw what the attention of the bundle in DIR looks at, in the classical model and in the sampled one.

    Per layer and head: the attention as a map of queries x keys, its entropy H, the effective support exp(H), and how far
    sampling moves the head's output and the attention itself. Writes one page, attention.html, and PNG pictures.
    """
    from qexport.attention import map_attention
    from qexport.cli.render_attention import show_attention
    from qexport.cli.text import progress_bar

    if texts and data:
        raise click.UsageError("--text and --data exclude each other")
    with progress_bar(quiet or as_json) as progress:
        maps = map_attention(bundle, list(texts) or data, pictures=not no_pictures, progress=progress, **options)
    if as_json:
        print_json(maps.to_dict())
    else:
        show_attention(maps, verbose)
