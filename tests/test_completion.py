"""What the shell completes, and that nobody waits for it."""

import os
import shlex
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
from cli_cases import processor_time

from qexport.cli import COMMANDS, Place


def complete(*words):
    """What bash is offered for the last word: [(kind, value)]."""
    env = os.environ | {
        "_QEXPORT_COMPLETE": "bash_complete",
        "COMP_WORDS": shlex.join(["qexport", *words]),
        "COMP_CWORD": str(len(words)),
    }
    code = "from qexport.cli import main; main()"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return [tuple(line.split(",", 1)) for line in done.stdout.splitlines()]


def test_the_shell_completes_commands_options_choices_and_paths():
    assert complete("") == [("plain", name) for name in COMMANDS]
    assert complete("comp") == [("plain", "compress"), ("plain", "compare"), ("plain", "completion")]
    assert complete("--ver") == [("plain", "--version")]
    assert complete("convert", "m", "--error") == [("plain", "--error-tolerance")]
    assert complete("convert", "m", "--strategy", "st") == [("plain", "stratified")]
    assert complete("completion", "") == [("plain", shell) for shell in ("bash", "zsh", "fish")]
    assert complete("validate", "some/fol") == [("dir", "some/fol")]
    assert complete("validate", "d", "--data", "te") == [("file", "te")]


def test_every_path_of_every_command_is_completed():
    """Parameters that are shown as a file or a folder, or hold one, are of a type that the shell knows."""
    shown = {"DIR", "FILE", "FOLDER", "PATH", "OUT"}
    named = {"bundle", "deployment", "model", "path", "data", "output"}
    for name in COMMANDS:
        for param in import_module(f"qexport.cli.{name.replace('-', '_')}").command.params:
            if param.metavar in shown or param.type.name in shown or param.name in named:
                assert isinstance(param.type, Place), f"{name} {param.name}"


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash on this machine")
def test_the_script_of_bash_works_in_bash(qexport, tmp_path):
    code, script, _ = qexport("completion", "bash")
    assert code == 0
    (tmp_path / "qexport").write_text(f'#!/bin/sh\nexec {sys.executable} -P -m qexport "$@"\n')
    (tmp_path / "qexport").chmod(0o755)
    script += (
        "\ncomplete -p qexport; COMP_WORDS=(qexport con); COMP_CWORD=1; _qexport_completion qexport; echo ${COMPREPLY[@]}"
    )
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[0].endswith("-F _qexport_completion qexport"), done.stderr
    assert done.stdout.splitlines()[1] == "convert"
    for shell in ("zsh", "fish"):
        code, script, _ = qexport("completion", shell)
        assert code == 0
        assert f"_QEXPORT_COMPLETE={shell}_complete" in script


@pytest.mark.parametrize("words", [("co",), ("convert", "m", "--strategy", ""), ("scaling", "--")])
def test_completion_is_quick(words):
    """A user waits for it at every tab."""
    assert complete(*words)
    assert 0 < processor_time(lambda: complete(*words)) < 0.3
