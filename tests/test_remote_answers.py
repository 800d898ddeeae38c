"""Measuring on another machine: targets that answer something else than what was asked."""

import json
import sys

import pytest
from bundle_factory import make_bundle
from ssh_server import fails

from qexport import profile
from qexport.deployment.library import MACHINES, this_target
from qexport.remote.connection import MOST_ANSWER, printable

pytestmark = pytest.mark.skipif(this_target() is None, reason=f"this machine is none of {', '.join(MACHINES)}")

HELLO = json.dumps({"hello": {"target": this_target(), "python": [3, 12, 1], "missing": []}})


# Reads all that is sent, then answers.
LIAR = """#!{python}
import sys, json
print({hello!r}, flush=True)
for line in sys.stdin.buffer:
    if b'{{"command": ["-m", "qexport.remote.worker"]}}' in line:
        break
{answer}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("remote") / "bundle")


@pytest.fixture
def liar(target, tmp_path):
    def make(answer, hello=HELLO):
        program = tmp_path / "python"
        program.write_text(LIAR.format(python=sys.executable, hello=hello, answer=answer))
        program.chmod(0o755)
        return target(str(program))

    return make


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("print('Welcome to Ubuntu\\x1b[2J')", "answered 'Welcome to Ubuntu?[2J', which is not what was asked"),
        ("print('[1, 2]')", "answered '[1, 2]'"),
        ("print('{\"report\": NaN}')", "which is not what was asked"),
        ("print('[' * 100000)", "which is not what was asked"),
        ("sys.stdout.buffer.write(b'\\xff\\x00{')", "which is not what was asked"),
        ("pass", "no reason given"),
        ("sys.exit('out of memory')", "out of memory (exit code 1)"),
        ("print(json.dumps({'removed': True}))", "no reason given"),
        ("print(json.dumps({'report': {}}))", "no reason given"),
        ("print(json.dumps({'report': [], 'removed': True}))", "no report of this qexport"),
        ("print(json.dumps({'report': {'bundle': '/etc'}, 'removed': True}))", "no report of this qexport"),
        ("print(json.dumps({'error': 'a\\nb\\x1b]0;c\\x07' + 'd' * 9999}))", "a b?]0;c?ddd"),
        ("print(json.dumps({'error': ['x']}))", "['x']"),
    ],
)
def test_answers_that_are_none(folder, liar, answer, says):
    text = fails(profile, folder, target=liar(answer))
    assert says in text
    assert text.isprintable()
    assert len(text) < 500


@pytest.mark.parametrize(
    ("hello", "says"),
    [
        ("Last login: today", "answered 'Last login: today'"),
        ('{"hello": {}}', "did not say what is installed there"),
        ('{"hello": {"target": "linux-riscv64", "python": [3, 12, 1], "missing": []}}', "is linux-riscv64"),
        ('{"hello": {"target": ["x"], "python": [3, 12, 1], "missing": []}}', "op libraries are for"),
        ('{"hello": {"target": "linux-x86_64", "python": [3, 9, 2], "missing": []}}', "Python 3.9.2 is too old"),
        ('{"hello": {"target": "linux-x86_64", "python": ["3"], "missing": []}}', "did not say"),
    ],
)
def test_introductions_that_are_none(folder, liar, hello, says):
    assert says in fails(profile, folder, target=liar("pass", hello))


def test_endless_answers_are_cut_off(folder, liar, monkeypatch):
    assert MOST_ANSWER > 1 << 20
    monkeypatch.setattr("qexport.remote.connection.MOST_ANSWER", 1 << 20)
    for answer in ("while True: print('{}')", "while True: print('x' * 1000, end='')"):
        assert "answered more than 1 MB; it was cut off" in fails(profile, folder, target=liar(answer))


def test_texts_of_a_target_do_not_steer_the_terminal():
    assert printable({"a\x1b": ["b\nc", "\ud800", "日本", 1.5, None]}) == {"a?": ["b c", "?", "日本", 1.5, None]}
