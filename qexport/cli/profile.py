"""qexport profile"""

import click

from qexport.cli import DIR, Numbers, common_options, make_target, print_json, provider_options, target_options


@click.command("profile")
@click.argument("bundle", type=DIR, metavar="DIR")
@click.option("--batch", type=Numbers(), default=(1,), help="Batch sizes to sweep [1].")
@click.option("--seq", type=Numbers(), default=(128,), help="Sequence lengths to sweep [128].")
@click.option("--runs", type=click.IntRange(1), default=50, show_default=True, help="Timed runs per model and size.")
@click.option("--warmup", type=click.IntRange(0), default=5, show_default=True, help="Runs before the clock starts.")
@click.option("--threads", type=click.IntRange(1), help="Intra-op threads [onnxruntime's choice].")
@click.option("--memory", is_flag=True, help="Where memory goes: peaks by source, leaks, efficiency, per node.")
@provider_options
@target_options
@common_options
def command(
    bundle,
    providers,
    allow_fallback,
    batch,
    seq,
    runs,
    warmup,
    threads,
    memory,
    target,
    library,
    python,
    ssh_config,
    as_json,
    quiet,
    verbose,
):
    """Time the bundle in DIR and its classical model in one run, interleaved: latency, per op, memory, placement.

    With --target on another machine, over ssh.
    """
    from qexport.cli.render import show_profile
    from qexport.cli.text import progress_bar
    from qexport.profiling import profile

    with progress_bar(quiet or as_json) as progress:
        report = profile(
            bundle,
            providers=providers,
            allow_fallback=allow_fallback,
            batch=batch,
            seq=seq,
            runs=runs,
            warmup=warmup,
            threads=threads,
            memory=memory,
            library=library or True,
            target=make_target(target, python, ssh_config),
            progress=progress,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        show_profile(report, verbose)
