"""docs/commands.md, from the commands themselves: python docs/commands.py > docs/commands.md"""

import inspect

import click

from qexport.cli import COMMANDS, cli

COMMON = ("--json", "-q, --quiet", "-v, --verbose", "-h, --help")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _rows(context: click.Context) -> list[tuple[str, str]]:
    """(names, what it does) of each option, as --help has them."""
    options = [param for param in context.command.get_params(context) if isinstance(param, click.Option)]
    return [(_cell(names), _cell(text)) for names, text in (option.get_help_record(context) for option in options)]


def _paragraph(block: str) -> list[str]:
    """A block of a command's help; one that click is told not to wrap is code."""
    if block.startswith("\b\n"):
        return ["", "```text", *block.splitlines()[1:], "```"]
    return ["", " ".join(block.split())]


def markdown_page() -> str:
    """docs/commands.md."""
    parent = click.Context(cli, info_name="qexport", **cli.context_settings)
    contexts = [click.Context(cli.get_command(parent, name), info_name=name, parent=parent) for name in COMMANDS]
    common = {names: text for context in contexts for names, text in _rows(context) if names in COMMON}
    lines = ["# Commands", "", "What `--help` says of every command. Made by `python docs/commands.py`.", ""]
    lines += ["Every command that reports something has:", "", "| option | |", "|---|---|"]
    lines += [f"| `{names}` | {common[names]} |" for names in COMMON]
    for context in contexts:
        usage = " ".join(["qexport", context.info_name, *context.command.collect_usage_pieces(context)])
        lines += ["", f"## {context.info_name}", "", "```sh", usage, "```"]
        lines += [line for block in inspect.cleandoc(context.command.help).split("\n\n") for line in _paragraph(block)]
        rows = [row for row in _rows(context) if row[0] not in COMMON]
        if rows:
            lines += ["", "| option | |", "|---|---|", *(f"| `{names}` | {text} |" for names, text in rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown_page(), end="")
