"""Deployments as text for people."""

from shlex import quote

import click

from qexport.words import plural


def show_deployment(output, manifest: dict) -> None:
    """What `bundle` packed."""
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    click.echo(
        f"{output}: {plural(len(manifest['files']), 'file')}, {size / 1e6:.1f} MB, for {manifest['target']} "
        f"({manifest['provider']}) with onnxruntime {manifest['min_onnxruntime']} and newer"
    )
    click.echo(f"next: qexport verify-bundle {quote(str(output))}; there: python3 run.py, or build cpp/ with CMake")


def show_verification(report) -> None:
    """What `verify-bundle` found."""
    click.echo(
        f"{report.path}: all {report.files} files as they were packed; sha256 of the manifest {report.manifest_sha256}"
    )
    if report.run is None:
        click.echo(f"the outputs were not checked, since it is for {report.target}: python3 run.py there does it")
        return
    from qexport.deployment.run import report as text_of

    click.echo(text_of(report.run))
