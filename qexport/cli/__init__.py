"""The `qexport` command. Each command parses, calls one function of the package and prints; no logic lives here.

Command modules are imported when they run, so that `--help` needs neither torch nor onnx.
"""

import errno
import json
import math
import os
import sys
from importlib import import_module

import click
from click.shell_completion import CompletionItem

from qexport import __version__
from qexport._swap import terminate_as_exception
from qexport.errors import QexportError

# Exit code of a command whose result does not hold what was asked for.
OUT_OF_TOLERANCE = 3
# name -> one line for --help; the command is the function `command` of qexport.cli.<name>
COMMANDS = {
    "convert": "Turn a transformer into a bundle with sampled attention.",
    "validate": "Compare a bundle with its classical model: per layer, end to end, over seeds.",
    "profile": "Time a bundle and its classical model side by side.",
    "scaling": "Measure time, memory and error of attention against the length.",
    "compress": "Make the weights small, at a loss that is asked for and measured.",
    "tune": "Find the fastest recipe that holds a tolerance on your inputs.",
    "attention": "Draw what each head looks at, and what sampling does to it.",
    "resilience": "Measure how noisy a quantum device may be before the model breaks.",
    "generate": "Continue a text with a bundle that has a KV cache.",
    "report": "Write one page on a bundle: verdict, accuracy, latency, memory, how to reproduce.",
    "compare": "Tell what changed between two JSON reports, and whether it is worse.",
    "bundle": "Pack what a device needs to run a bundle's model: a deployment.",
    "verify-bundle": "Check a deployment: its files and its outputs.",
    "inspect": "Show what a bundle or an .onnx file contains.",
    "ops": "List the ops of the domain com.qexport.",
    "doctor": "Check this installation and say how to mend it.",
    "demo": "Convert, validate and profile a real model from the [demo] extra.",
    "completion": "Print the script that makes your shell complete this command.",
}


class Commands(click.Group):
    """A click group that imports a command's module only when the command is used."""

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        return import_module(f"qexport.cli.{name.replace('-', '_')}").command

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx, incomplete):
        """From the table, as click's own would import every command."""
        names = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return names + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(self, ctx, args):
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}; commands: {', '.join(COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 out of tolerance.",
)
@click.version_option(__version__, prog_name="qexport")
def cli():
    """Turn a transformer into one ONNX file with sampled (quantum-inspired) attention; check it and time it.

    Start with `qexport demo`, or `qexport convert MODEL -o DIR`, then `qexport validate DIR` and `qexport profile DIR`.
    """


class Place(click.ParamType):
    """A path, which the library checks: here it is what the shell completes, a "file" or a "dir"."""

    def __init__(self, name: str, kind: str):
        self.name = name
        self.kind = kind

    def shell_complete(self, ctx, param, incomplete):
        return [CompletionItem(incomplete, type=self.kind)]


FILE, DIR = Place("FILE", "file"), Place("DIR", "dir")


class Numbers(click.ParamType):
    """Whole numbers >= `least`: one, or several with commas (32, or 128,512)."""

    name = "N[,N...]"

    def __init__(self, least: int = 1):
        self.least = least

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a whole number or a list of them, such as 128 or 128,512", param, ctx)
        if min(numbers) < self.least:
            self.fail(f"must be >= {self.least}, got {min(numbers)}", param, ctx)
        return numbers


class Share(click.ParamType):
    """A relative error: 0.01, or 1%."""

    name = "E"

    def convert(self, value, param, ctx):
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            self.fail(f"{value!r} is not a relative error such as 0.01 or 1%", param, ctx)
        if text.endswith("%"):
            return number / 100
        if 1 < number < math.inf:
            self.fail(f"{text} is {100 * number:g} %; write {text}% or {number / 100:g} for {text} %", param, ctx)
        return number


class Shots(click.ParamType):
    """A number of measurements, or inf, infinitely many; with `several` a tuple of those that commas separate."""

    def __init__(self, several: bool = False):
        self.several = several
        self.name = "S,..." if several else "S"

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        try:
            found = tuple(part if part == "inf" else int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a whole number or inf", param, ctx)
        if not self.several and len(found) > 1:
            self.fail(f"takes one number, got {value!r}", param, ctx)
        return found if self.several else found[0]


class Levels(click.ParamType):
    """Numbers >= 0, several with commas."""

    name = "L,..."

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of levels, such as 0.001,0.01", param, ctx)


def common_options(function):
    """--json, -q and -v of every command that reports something."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="Show tracebacks and the logs of the libraries underneath."),
        click.option("-q", "--quiet", is_flag=True, help="No progress on stderr."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout and nothing else."),
    ):
        function = option(function)
    return function


class Provider(click.ParamType):
    """An execution provider by its short or its full name; the library knows which are there."""

    name = "NAME"

    def shell_complete(self, ctx, param, incomplete):
        from qexport.providers import SHORT

        return [CompletionItem(name) for name in (*SHORT, *SHORT.values()) if name.startswith(incomplete)]


def provider_options(function):
    """--provider and --allow-fallback, of the commands that run a bundle: the arguments `providers` and `allow_fallback`."""
    for option in (
        click.option("--allow-fallback", is_flag=True, help="Run nodes on the CPU that lack a CUDA kernel."),
        click.option(
            "--provider",
            "providers",
            type=Provider(),
            multiple=True,
            callback=lambda ctx, param, names: list(names) or None,
            help="Where to run: cpu, cuda or a name of onnxruntime; repeatable, the preferred one first [cpu].",
        ),
    ):
        function = option(function)
    return function


def target_options(function):
    """--target and what goes with it, of the commands that can measure on another machine."""
    for option in (
        click.option("--ssh-config", type=FILE, help="Configuration for ssh [your own]."),
        click.option("--python", metavar="NAME", help="Python there, with numpy and onnxruntime [python3]."),
        click.option("--library", type=FILE, help="Op library, or a wheel of qexport with it [the installed one]."),
        click.option("--target", metavar="URL", help="Measure on another machine: ssh://user@host[:port]."),
    ):
        function = option(function)
    return function


def make_target(url: str | None, python: str | None, ssh_config: str | None):
    """The `qexport.remote.Target` that the options ask for, None for this machine."""
    if url is None:
        if python or ssh_config:
            raise click.UsageError("--python and --ssh-config go with --target")
        return None
    from qexport.remote.connection import Target

    return Target(url, python or "python3", ssh_config)


def print_json(document: dict) -> None:
    """The machine-readable answer of a command."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))


def main(argv=None) -> None:
    """Entry point of the `qexport` script: run a command and leave with its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verbose = any(word in ("-v", "--verbose") for word in argv)
    try:
        with terminate_as_exception():
            code = cli.main(argv, prog_name="qexport", standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        click.echo(f"qexport: interrupted; nothing was left half-written{_notes(error.__cause__ or error)}", err=True)
        code = 130
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except QexportError as error:
        if verbose:
            raise
        click.echo(f"qexport: error: {error}{_notes(error)}", err=True)
        code = error.exit_code
    except Exception as error:  # the last boundary
        if verbose:
            raise
        click.echo(f"qexport: {_unforeseen(error)}{_notes(error)}", err=True)
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _unforeseen(error: Exception) -> str:
    """What no layer below foresaw, in one line with the way to the traceback."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"error: no room is left where {error.filename or 'the output'} goes; free some"
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"internal error: {type(error).__name__}: {first} (run again with -v for the traceback)"


def _notes(error: BaseException) -> str:
    """What was added to an error on its way, for the same line."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
