"""qexport doctor"""

import click

from qexport.cli import common_options, print_json


@click.command("doctor")
@common_options
def command(as_json, quiet, verbose):
    """Check this installation: runtime, op library, kernel, providers, extras. Exit code 1 when something is broken."""
    from qexport.doctor import all_well, doctor
    from qexport.documents import make_document

    findings = doctor()
    well = all_well(findings)
    if as_json:
        print_json(make_document("doctor", {"ok": well, "findings": [finding.to_dict() for finding in findings]}))
    else:
        for finding in findings:
            click.echo(f"{finding.state:7}{finding.subject:12}{finding.found}")
            if finding.mend:
                click.echo(f"{'':19}mend: {finding.mend}")
    raise click.exceptions.Exit(0 if well else 1)
