"""qexport validate"""

import click

from qexport.cli import (
    DIR,
    FILE,
    OUT_OF_TOLERANCE,
    Share,
    common_options,
    make_target,
    print_json,
    provider_options,
    target_options,
)


@click.command("validate")
@click.argument("bundle", type=DIR, metavar="DIR")
@click.option(
    "--data", type=FILE, help="Inputs: .npz with an array per input, or .txt with a text per line [stored samples]."
)
@click.option("--max-error", type=Share(), help="Relative error allowed at the model's outputs [what the recipe allows].")
@click.option("--seeds", type=click.IntRange(1, 10000), default=5, show_default=True, help="Runs of the sampled model.")
@click.option("--batch", type=click.IntRange(1), help="Items per run; generates inputs when there is no --data.")
@click.option("--seq", type=click.IntRange(1), help="Sequence length of generated inputs; texts are cut to it.")
@provider_options
@target_options
@common_options
def command(bundle, data, target, library, python, ssh_config, as_json, quiet, verbose, **options):
    """Compare the bundle in DIR with its classical model, with and without the op library.

    With --target on another machine, over ssh. Exit code 3 when the error is out of tolerance.
    """
    from qexport.cli.render import show_validation
    from qexport.cli.text import progress_bar
    from qexport.validation import validate

    with progress_bar(quiet or as_json) as progress:
        report = validate(
            bundle,
            data,
            library=library or True,
            target=make_target(target, python, ssh_config),
            progress=progress,
            **options,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        show_validation(report, verbose)
    raise click.exceptions.Exit(0 if report.passed else OUT_OF_TOLERANCE)
