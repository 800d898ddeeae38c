"""What a user watches while a command runs: a bar on a terminal, and nothing where nobody looks."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from inspect import signature

import numpy as np
import pytest
from bundle_factory import make_bundle

from qexport import convert, profile, tune, validate
from qexport.attention import map_attention
from qexport.compression import compress
from qexport.deployment import pack_deployment, verify_deployment
from qexport.errors import UsageError
from qexport.reporting import report
from qexport.resilience import measure_resilience
from qexport.scaling import sweep
from qexport.tuning.samples import error_by_samples


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("progress") / "bundle")


# What takes longer than a moment, in its smallest form. `demo` is made of the first three.
CALLS = {
    "convert": lambda bundle, folder, say: convert(bundle / "classical.onnx", folder / "out", progress=say),
    "validate": lambda bundle, folder, say: validate(bundle, seeds=2, progress=say),
    "profile": lambda bundle, folder, say: profile(bundle, seq=(4, 8), runs=2, progress=say),
    "scaling": lambda bundle, folder, say: sweep((8, 16), heads=1, strategies=["exact"], progress=say),
    "attention": lambda bundle, folder, say: map_attention(bundle, output=folder, pictures=False, progress=say),
    "samples": lambda bundle, folder, say: error_by_samples(bundle, seq=40, progress=say),
    "tune": lambda bundle, folder, say: tune(bundle, max_error=0.5, trials=2, seeds=1, progress=say),
    "bundle": lambda bundle, folder, say: pack_deployment(bundle, folder / "out", progress=say),
    "report": lambda bundle, folder, say: report(
        bundle, folder / "page.html", skip=("scaling", "samples"), seq=(4,), runs=2, seeds=2, progress=say
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_flag_is_no_listener(name, bundle, tmp_path):
    with pytest.raises(UsageError, match="progress must be a function of the step in words and the share done, got True"):
        CALLS[name](bundle, tmp_path, True)


@pytest.mark.parametrize("name", CALLS)
def test_the_share_that_is_done_only_grows(name, bundle, tmp_path):
    told = []
    CALLS[name](bundle, tmp_path, lambda step, done: told.append((step, done)))
    shares = [done for _, done in told]
    assert len(told) >= 3
    assert shares == sorted(shares)
    assert shares[0] < 0.5 <= shares[-1] <= 1
    assert all(step == step.strip() and "\n" not in step for step, _ in told)


@pytest.mark.parametrize(
    "function",
    [
        convert,
        profile,
        tune,
        validate,
        map_attention,
        compress,
        measure_resilience,
        report,
        pack_deployment,
        verify_deployment,
    ],
)
def test_progress_is_described_alike(function):
    assert signature(function).parameters["progress"].default is None
    assert "progress: called with the step in words and the share that is done, 0 to 1." in function.__doc__


def on_terminal(*words, cwd):
    """A command whose stderr is a terminal of 100 columns and whose stdout is a pipe: (exit code, stdout, stderr)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-P", "-m", "qexport", *map(str, words)]
    env = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, cwd=cwd, env=env, text=True) as running:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # how Linux says that nobody writes any more
            pass
        out = running.stdout.read()
    os.close(ours)
    return running.returncode, out, shown.decode()


def test_a_bar_is_drawn_and_taken_away_again(bundle, tmp_path):
    code, out, shown = on_terminal("validate", bundle, "--seeds", 2, "--max-error", "200%", cwd=tmp_path)
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"10% 0:0\d:\d\d running the models, with the library, 2 seeds", plain)
    assert re.search(r"75% 0:0\d:\d\d comparing each site alone", plain)
    assert re.search(r"\x1b\[2K\s*$", shown)  # the last it does is to clear its line
    assert "running the models" not in out
    assert "PASSED" in out


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_no_bar_where_it_is_not_wanted(option, bundle, tmp_path):
    code, out, shown = on_terminal("validate", bundle, "--seeds", 2, "--max-error", "200%", option, cwd=tmp_path)
    assert (code, shown) == (0, "")
    assert out


def test_an_error_follows_on_a_line_of_its_own(bundle, tmp_path):
    np.savez(tmp_path / "bad.npz", nonsense=np.zeros(3))
    code, out, shown = on_terminal("validate", bundle, "--data", tmp_path / "bad.npz", cwd=tmp_path)
    assert (code, out) == (1, "")
    assert re.search(r"\x1b\[2K\s*qexport: error: [^\n]+\n$", shown), shown
