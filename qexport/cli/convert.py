"""qexport convert"""

import click

from qexport.cli import DIR, FILE, Numbers, Share, Shots, common_options, print_json
from qexport.ops import QUANTUM_ATTENTION


def choices(attribute: str) -> click.Choice:
    """The values that the op table allows for an attribute."""
    return click.Choice(QUANTUM_ATTENTION.attribute(attribute).choices)


@click.command("convert")
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=DIR, help="Folder of the bundle; an older bundle there is replaced.")
@click.option("--strategy", type=choices("strategy"), help="How attention is computed, see docs/math.md [tree].")
@click.option("--error-tolerance", type=Share(), help="tree: relative error allowed at each attention; 0 is off [1%].")
@click.option("--precision", type=choices("precision"), help="Lowest precision of products; exact and tree [tree: auto].")
@click.option(
    "--num-samples",
    type=Numbers(),
    help="Keys read per query, one number or one per head [tree: 64, others: 32]; without a tolerance, tree reads just so "
    "many.",
)
@click.option("--residual", type=choices("residual"), help="tree: what becomes of the keys left unread [verify_only].")
@click.option(
    "--control-variate/--no-control-variate", default=None, help="Strategies that draw: around the mean of V [on]."
)
@click.option(
    "--noise", metavar="MODEL:LEVEL,...", help="Attention as a noisy device computes it, such as depolarizing:0.01."
)
@click.option("--shots", type=Shots(), help="Measurements of each row with --noise; inf for none [1024].")
@click.option("--seed", type=int, help="Default of the model's seed input [0].")
@click.option("--opset", type=click.IntRange(17, 24), help="Opset of the file; 17 to 22 for older runtimes [23].")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Type of the weights [as they are].")
@click.option("--task", help="Which head of a Hugging Face model [feature-extraction].")
@click.option("--kv-cache", type=click.IntRange(2), metavar="N", help="Give a causal language model a cache of N tokens.")
@click.option("--config", type=FILE, help="Recipe in YAML; options given here win over it.")
@click.option("--dry-run", is_flag=True, help="Find and list the attentions, write nothing.")
@common_options
def command(model, output, config, dry_run, as_json, quiet, verbose, **options):
    """Turn MODEL into a bundle with sampled attention.

    Without options each attention is computed to 1 % or better, as fast as that allows. `qexport validate DIR` measures
    what it comes to, and `qexport tune DIR` finds the fastest recipe for an error of your choice.

    MODEL is a Hugging Face folder, a package.module:callable that returns a torch module and its example inputs, a .pt2
    file of torch.export, or an .onnx file (opset 11 or newer).
    """
    from qexport.cli.render import show_conversion
    from qexport.cli.text import progress_bar
    from qexport.conversion import convert

    if output is None and not dry_run:
        raise click.UsageError("give the folder of the bundle with -o DIR, or look first with --dry-run")
    with progress_bar(quiet or as_json) as progress:
        report = convert(model, output, recipe=config, dry_run=dry_run, progress=progress, **options)
    if as_json:
        print_json(report.to_dict())
    else:
        show_conversion(report, verbose)
