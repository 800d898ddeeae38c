"""qexport resilience"""

import click

from qexport.cli import DIR, FILE, Levels, Share, Shots, common_options, print_json, provider_options


@click.command("resilience")
@click.argument("bundle", type=DIR, metavar="DIR")
@click.option(
    "--data", type=FILE, help="Inputs: .npz with an array per input, or .txt with a text per line [stored samples]."
)
@click.option("--noise", default="depolarizing", show_default=True, metavar="MODELS", help="Channels, all at one level.")
@click.option("--levels", type=Levels(), help="Levels of the noise [0.001 to 0.1].")
@click.option("--shots", type=Shots(several=True), help="Measurements of each row; inf: the probabilities [128,1024,inf].")
@click.option(
    "--mitigation", default="none", show_default=True, metavar="M,...", help="none, zne, repetition:3, readout_inversion."
)
@click.option("--seeds", type=click.IntRange(1, 10000), default=5, show_default=True, help="Runs of each cell that draws.")
@click.option("--tolerance", type=Share(), default=0.01, show_default=True, help="Loss of the metric that is acceptable.")
@click.option("--metric", type=click.Choice(["perplexity", "top1", "cosine"]), help="What is lost [by the model].")
@click.option("--batch", type=click.IntRange(1), help="Items per run; generates inputs when there is no --data.")
@click.option("--seq", type=click.IntRange(1), help="Sequence length of generated inputs; texts are cut to it.")
@click.option("--plot", type=FILE, help="Draw it to a .png, .svg or .pdf; needs matplotlib.")
@provider_options
@common_options
def command(bundle, mitigation, as_json, quiet, verbose, levels, shots, **options):
    """Measure how noisy a quantum device may be before the model in DIR breaks.

    Every attention of the bundle's classical model is computed as a noisy device would: probabilities, noise, measurements.
    The model runs at every level of noise, number of shots and mitigation, and the table tells what its task loses, and the
    level up to which that stays within the tolerance.
    """
    from qexport.cli.render_resilience import show_resilience
    from qexport.cli.text import progress_bar
    from qexport.resilience import measure_resilience

    given = {name: value for name, value in (("levels", levels), ("shots", shots)) if value is not None}
    with progress_bar(quiet or as_json) as progress:
        report = measure_resilience(bundle, mitigation=mitigation.split(","), progress=progress, **given, **options)
    if as_json:
        print_json(report.to_dict())
    else:
        show_resilience(report, verbose)
