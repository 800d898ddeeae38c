"""qexport generate"""

import click

from qexport.cli import DIR, common_options, print_json, provider_options


@click.command("generate")
@click.argument("bundle", type=DIR)
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=100, show_default=True, help="Tokens at most.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-k", type=click.IntRange(1), help="Draw among so many likeliest tokens only; with a temperature.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws and the sampled attention.")
@click.option("--no-library", is_flag=True, help="Without the op library: classical attention.")
@provider_options
@common_options
def command(bundle, as_json, quiet, verbose, no_library, **options):
    """Continue a text with BUNDLE, which was converted with --kv-cache, token by token."""
    from qexport.text_generation import generate_text

    start = iter([options["prompt"]])  # shown with the first piece, when what is asked for has been had
    show = None if as_json else lambda text: click.echo(next(start, "") + text, nl=False)
    report = generate_text(bundle, library=not no_library, on_text=show, **options)
    if as_json:
        print_json(report.to_dict())
        return
    click.echo(next(start, ""))
    if report.finish_reason == "cache":
        click.echo(
            f"stopped: the cache of {report.cache_length} tokens is full; convert the model with a longer --kv-cache",
            err=True,
        )
    if not quiet and report.tokens_per_s is not None:
        click.echo(f"{len(report.tokens)} tokens, {report.tokens_per_s:.0f} a second after the prompt", err=True)
