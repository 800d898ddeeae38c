"""Measuring on another machine over ssh: the same reports, and nothing left there, however it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bundle_factory import make_bundle, make_text_bundle
from deployment_cases import AARCH64, elf
from ssh_server import fails, free_port

import qexport as package
from qexport import profile, validate
from qexport.cuda_checks import provider_obstacle
from qexport.deployment.library import LIBRARY, MACHINES, PLUGIN, this_target
from qexport.errors import UsageError
from qexport.installed import get_library_path

pytestmark = pytest.mark.skipif(this_target() is None, reason=f"this machine is none of {', '.join(MACHINES)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("remote") / "bundle")


@pytest.fixture
def options(server, pythons):
    """The options of the command that say the same."""

    def make(python="plain"):
        return ["--target", server.url, "--python", pythons[python], "--ssh-config", server.config()]

    return make


def test_profile_needs_numpy_and_onnxruntime_there(folder, server, target):
    """The report is the one of this machine: same keys at every depth, same nodes; measured where it says."""
    sizes = {"batch": 2, "seq": 8, "runs": 6, "warmup": 1, "threads": 1}
    steps = []
    there = profile(folder, target=target(), progress=lambda step, done: steps.append(step), **sizes).to_dict()
    here = profile(folder, **sizes).to_dict()
    assert there.pop("target") == server.url
    assert here.pop("target") is None
    assert shape(there) == shape(here)
    assert there["bundle"] == here["bundle"] == str(folder)
    assert there["versions"] == here["versions"]
    assert there["settings"] == here["settings"]
    model = there["sizes"][0]["models"]["converted"]
    assert {op["op"] for op in model["ops"]} >= {"QuantumAttention"}
    assert model["memory"]["peak_bytes"] > 1 << 20
    assert "127.0.0.1: timing batch 2, length 8" in steps
    assert server.left() == []


def flat(value) -> list[float]:
    """The numbers of a report, in their order."""
    if isinstance(value, dict):
        return flat(list(value.values()))
    if isinstance(value, list):
        return [number for item in value for number in flat(item)]
    return [float(value)] if isinstance(value, (int, float)) else []


def shape(value):
    """Keys and types of a report; numbers are figures, and lists are as their first element (times differ, so do orders)."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def test_validate_finds_there_what_it_finds_here(folder, server, options, qexport, tmp_path):
    """The processor and the library are the same, and so are the seeds; numpy adds up in an order of its own."""
    data = tmp_path / "data.npz"
    rng = np.random.default_rng(3)
    np.savez(data, input_ids=rng.integers(0, 50, (3, 20)), attention_mask=np.ones((3, 20), np.int64))
    for chosen in ([], ["--data", data, "--batch", 2]):
        arguments = ["validate", folder, "--json", "--seeds", 2, "--max-error", "500%", *chosen]
        code, out, _ = qexport(*arguments, *options("onnx"))
        there, here = json.loads(out), json.loads(qexport(*arguments)[1])
        assert code == 0
        assert there.pop("target") == server.url
        assert here.pop("target") is None
        assert shape(there) == shape(here)
        assert flat(there) == pytest.approx(flat(here), rel=1e-9)
    code, out, _ = qexport("validate", folder, "--seeds", 1, "--max-error", "1e-6", *options("onnx"))
    assert code == 3
    assert f"{folder} at {server.url} on stored samples" in out
    assert server.left() == []


def test_texts_are_read_here(target, server, tmp_path):
    pytest.importorskip("tokenizers")
    bundle = make_text_bundle(tmp_path / "bundle")
    report = validate(bundle, ["the cat sat", "the cat"], max_error=5, seeds=2, target=target("onnx"))
    assert report.data["samples"] == 2
    assert server.left() == []


def test_what_is_missing_there(folder, server, target):
    text = fails(profile, folder, target=target("bare"))
    assert "onnxruntime not installed for" in text
    assert "pip install onnxruntime there" in text
    assert "onnx not installed" in fails(validate, folder, target=target("plain"))
    text = fails(profile, folder, target=target("no-such-python"))
    assert "cannot run 'no-such-python'" in text
    assert "--python" in text
    assert server.left() == []


def test_our_own_python_is_refused_where_it_hides_the_copy(folder, target, server):
    """An editable install comes before everything on the path."""
    finders = subprocess.run([sys.executable, "-P", "-c", "import qexport; print(qexport.__file__)"], capture_output=True)
    installed = Path(os.fsdecode(finders.stdout.strip()))
    if "site-packages" in installed.parts:
        assert profile(folder, seq=8, runs=1, warmup=0, target=target(sys.executable)).target
    else:
        assert "editable install of qexport" in fails(profile, folder, target=target(sys.executable))
    assert server.left() == []


def test_errors_of_the_job_come_back_as_they_are(folder, target, options, qexport, server):
    text = fails(profile, folder, seq=65, target=target())
    assert "sequence 65 is longer than the model takes (64); lower it" in text
    assert qexport("profile", folder, "--seq", 65, *options())[0] == 2
    assert f"{server.url}: threads must be at most" in fails(profile, folder, seq=8, threads=10**6, target=target())
    for command in ("profile", "validate"):
        code, out, err = qexport(command, folder, "--provider", "NoProvider", *options("onnx"))
        assert (code, out) == (2, "")
        assert "provider 'NoProvider' is not in this onnxruntime" in err
    assert server.left() == []


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"known": None}, "its host key is not known here"),
        ({"known": "stranger"}, "its host key is another one than before"),
        ({"key": "stranger"}, "it accepts none of your keys"),
    ],
)
def test_hosts_and_users_must_know_each_other(folder, server, target, chosen, says):
    """Though the configuration says StrictHostKeyChecking no; and a host that was refused is not remembered."""
    for _ in range(2):
        config = server.config("other_config", **chosen)
        before = config.with_name("other_config.known").read_text()
        assert says in fails(profile, folder, target=target(config=config))
        assert config.with_name("other_config.known").read_text() == before
    assert server.left() == []


def test_a_wrong_port(folder, server, target):
    url = server.url.rpartition(":")[0] + f":{free_port()}"
    assert "Connection refused" in fails(profile, folder, target=target(url=url))


@pytest.mark.parametrize(
    "url",
    [
        "host",
        "http://host",
        "ssh://",
        "ssh://-oProxyCommand=touch x",
        "ssh://-l@host",
        "ssh://a b@host",
        "ssh://me:secret@host",
        "ssh://host:99999",
        "ssh://host:port",
        "ssh://host/etc",
        "ssh://host?x",
        "ssh://host;reboot",
    ],
)
def test_urls(folder, url, qexport):
    with pytest.raises(UsageError, match="is not of the form ssh://user@host"):
        profile(folder, target=url)
    assert qexport("profile", folder, "--target", url)[0] == 2


def test_options_that_go_together(folder, server, qexport, tmp_path):
    code, _, err = qexport("validate", folder, "--python", "python3")
    assert (code, "--python and --ssh-config go with --target" in err) == (2, True)
    code, _, err = qexport("validate", folder, "--target", server.url, "--ssh-config", tmp_path / "nothing")
    assert (code, "no such ssh configuration file" in err) == (1, True)


def test_a_library_for_another_machine_is_not_sent(folder, target, tmp_path, server):
    if this_target() != "linux-x86_64":
        pytest.skip("the file is one for aarch64")
    (tmp_path / "other.so").write_bytes(elf(AARCH64))
    assert "does not fit the target linux-x86_64" in fails(profile, folder, library=tmp_path / "other.so", target=target())
    assert server.left() == []


def test_without_cuda_kernels_here_nodes_may_run_on_the_cpu_there(folder, target, server, tmp_path):
    """The job begins, and then ends for the target's want of a GPU."""
    if provider_obstacle() is None:
        pytest.skip("CUDA works on this machine")
    library = tmp_path / LIBRARY
    shutil.copyfile(get_library_path(), library)
    ask = {"seq": 8, "library": library, "providers": ["cuda"], "target": target()}
    assert f"{PLUGIN}: no such file" in fails(profile, folder, **ask)
    assert "provider 'CUDAExecutionProvider' " in fails(profile, folder, **ask, allow_fallback=True)
    assert server.left() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing(folder, server, pythons, number):
    """Neither files nor processes, even where we are killed without a chance to say good-bye."""
    command = [sys.executable, "-m", "qexport", "profile", str(folder), "--runs", "10000000", "--target", server.url]
    command += ["--python", str(pythons["plain"]), "--ssh-config", str(server.config())]
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not list(server.temporary.glob("qexport-*/job.json")):
        assert time.monotonic() < deadline
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    (made,) = server.temporary.iterdir()
    while not jobs_in(made):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number], err
    assert server.left() == []
    while jobs_in(made):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def jobs_in(folder: Path) -> list[str]:
    """Processes that work in a folder, which may be gone."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            where = os.readlink(link)
        except OSError:
            continue
        if where.removesuffix(" (deleted)") == str(folder):
            found.append(link.parent.name)
    return found


def test_a_full_disk_there(folder, target, server, monkeypatch):
    """A file where a folder has to be: whatever cannot be written there is said, and what was is removed."""
    from qexport.remote.connection import Connection

    send = Connection.send

    def spoiled(self, name, source):
        if name == "job.json":
            send(self, "lib", b"")
            send(self, "lib/more/file", b"x" * (1 << 24))
        send(self, name, source)

    monkeypatch.setattr(Connection, "send", spoiled)
    text = fails(profile, folder, seq=8, target=target())
    assert "cannot write what was sent" in text
    assert server.left() == []
