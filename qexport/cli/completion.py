"""qexport completion"""

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell):
    """Print the script that makes SHELL complete commands, options, choices and paths of qexport.

    \b
    bash  echo 'eval "$(qexport completion bash)"' >> ~/.bashrc
    zsh   echo 'eval "$(qexport completion zsh)"' >> ~/.zshrc     # below compinit
    fish  qexport completion fish > ~/.config/fish/completions/qexport.fish
    """
    from click.shell_completion import get_completion_class

    from qexport.cli import cli

    click.echo(get_completion_class(shell)(cli, {}, "qexport", "_QEXPORT_COMPLETE").source())
