"""Bundles are written all or nothing, and what is wrong with one is said in one line."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from bundle_factory import make_bundle

from qexport.bundle import MANIFEST, Bundle
from qexport.bundle_writer import check_output, write_bundle
from qexport.errors import QexportError, UsageError

MINIMAL = {"sites": [], "left_alone": [], "inputs": [], "limits": {}, "opset": 23, "seed_input": "seed"}


def write_small(folder, content=b"model"):
    with write_bundle(folder) as writer:
        (writer.path / "model.onnx").write_bytes(content)
        (writer.path / "classical.onnx").write_bytes(b"classical")
        (writer.path / "test_data_set_0").mkdir()
        (writer.path / "test_data_set_0" / "input_0.pb").write_bytes(b"sample")
        writer.manifest = dict(MINIMAL)


def digest(folder: Path) -> dict[str, str]:
    """Every path below `folder`, hidden ones too, with the sha256 of the files."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in folder.rglob("*")
    }


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_round_trip(tmp_path):
    write_small(tmp_path / "a" / "b")
    bundle = Bundle.open(tmp_path / "a" / "b", verify=True)
    assert set(bundle.manifest["files"]) == {"model.onnx", "classical.onnx", "test_data_set_0/input_0.pb"}
    assert bundle.manifest["files"]["model.onnx"] == {"sha256": hashlib.sha256(b"model").hexdigest(), "bytes": 5}
    assert bundle.manifest["schema_version"] == 1
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_replaces_a_bundle_and_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    for content in (b"first", b"second"):
        write_small(tmp_path / "out", content)
        assert Bundle.open(tmp_path / "out", verify=True).model_path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_works_without_the_exchange_system_call(tmp_path, monkeypatch):
    monkeypatch.setattr("qexport._swap._rename_exchange", lambda new, target: False)
    for content in (b"first", b"second"):
        write_small(tmp_path / "out", content)
    assert Bundle.open(tmp_path / "out", verify=True).model_path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_second_rename_puts_the_old_bundle_back(tmp_path, monkeypatch):
    import os

    write_small(tmp_path / "out")
    before = digest(tmp_path)
    monkeypatch.setattr("qexport._swap._rename_exchange", lambda new, target: False)
    rename = os.rename

    def failing(source, target):
        if str(source).endswith(".partial"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("os.rename", failing)
    with pytest.raises(QexportError, match="cannot write the bundle"):
        write_small(tmp_path / "out", b"second")
    assert digest(tmp_path) == before


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_everything_as_it_was(tmp_path, existing):
    if existing:
        write_small(tmp_path / "deep" / "out")
    before = digest(tmp_path)

    def fail_half_way():
        with write_bundle(tmp_path / "deep" / "out") as writer:
            (writer.path / "model.onnx").write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert digest(tmp_path) == before


# A child that writes a bundle slowly, says when it is half-way, and reports how the command line would end.
SLOW_WRITER = """
import sys, time
sys.path.insert(0, {tests!r})
from qexport.bundle_writer import write_bundle
from test_bundle import MINIMAL
with write_bundle({folder!r}) as writer:
    (writer.path / "model.onnx").write_bytes(b"half of it")
    print("half", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("existing", [True, False])
def test_a_signal_half_way(tmp_path, number, existing):
    if existing:
        write_small(tmp_path / "out")
    before = digest(tmp_path)
    code = textwrap.dedent(SLOW_WRITER).format(tests=str(Path(__file__).parent), folder=str(tmp_path / "out"))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "half\n", child.communicate()[1]
    assert digest(tmp_path) != before  # the half-written one is there
    child.send_signal(number)
    child.communicate(timeout=60)  # the writer would wait for ten times as long
    assert child.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert digest(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL on Windows")
def test_what_a_killed_writer_leaves_is_removed_by_the_next(tmp_path):
    """SIGKILL (or the kernel, out of memory) cannot be caught; a writer that still lives keeps its folder."""
    code = textwrap.dedent(SLOW_WRITER).format(tests=str(Path(__file__).parent), folder=str(tmp_path / "out"))
    children = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for child in children:
        assert child.stdout.readline() == "half\n"
    children[0].kill()
    children[0].communicate()
    assert len(list(tmp_path.iterdir())) == 2
    write_small(tmp_path / "out")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names[-1] == "out"
    assert [f".{children[1].pid}." in name for name in names[:-1]] == [True]
    children[1].send_signal(signal.SIGINT)
    children[1].communicate(timeout=60)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_signal_during_the_exchange_waits_for_its_end(tmp_path, monkeypatch):
    import qexport.bundle_writer

    write_small(tmp_path / "out")
    exchange = qexport.bundle_writer.exchange

    def interrupted(new, target):
        signal.raise_signal(signal.SIGINT)
        exchange(new, target)

    monkeypatch.setattr("qexport.bundle_writer.exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_small(tmp_path / "out", b"second")
    assert Bundle.open(tmp_path / "out", verify=True).model_path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


FULL_DISK = """
import resource, sys
sys.path.insert(0, {tests!r})
from qexport.bundle_writer import write_bundle
from qexport.errors import QexportError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with write_bundle({folder!r}) as writer:
        {write}
except QexportError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE on Windows")
@pytest.mark.parametrize(
    "write",
    [
        "(writer.path / 'model.onnx').write_bytes(bytes(100_000))",
        "import numpy; numpy.zeros(100_000).tofile(writer.path / 'model.onnx')",
        "from onnx import *; import numpy; save_tensor(numpy_helper.from_array(numpy.zeros(9999)), writer.path / 'x.pb')",
    ],
)
def test_a_full_disk(tmp_path, write):
    write_small(tmp_path / "out")
    before = digest(tmp_path)
    code = FULL_DISK.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "out"), write=write)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert child.stdout.splitlines() == [
        f"{tmp_path / 'out'}: the disk is full or over its limit; free some space or choose another folder"
    ], child.stderr
    assert digest(tmp_path) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE on Windows")
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("r.html", "from qexport.reporting import _write; _write(file, text)"),
        ("r.yaml", "from qexport.tuning.output import _write_yaml; _write_yaml(file, {'strategy': 'exact'}, text)"),
        (
            "r.png",
            "from qexport.memory.plot import draw;"
            "draw({'counters': ['rss'], 'blocks': [], 'timeline': {'rss': {'seconds': [0, 1], 'bytes': [1, 2]}}}, file)",
        ),
    ],
)
def test_a_full_disk_leaves_the_old_file(tmp_path, name, write):
    if name.endswith(".png"):
        pytest.importorskip("matplotlib")
    (tmp_path / name).write_text("years of work")
    code = textwrap.dedent(f"""
        import resource
        from pathlib import Path
        from qexport.errors import QexportError
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        file, text = Path({str(tmp_path / name)!r}), "words " * 1000
        try:
            {write}
        except QexportError as error:
            print(error)
    """)
    child = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert "File too large" in child.stdout, child.stderr
    assert len(child.stdout.splitlines()) == 1
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "years of work")]


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(QexportError, match="File name too long") as error:
        write_small(tmp_path / ("x" * 300))
    assert "\n" not in str(error.value)


def test_an_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(QexportError) as error, write_bundle(tmp_path / "file" / "out"):
        pass
    target = tmp_path / "file" / "out"
    assert f"{target}: cannot be written, {tmp_path / 'file'} is no folder to write to" in one_line(error)


def test_a_folder_without_permission_is_named_before_anything_runs(tmp_path, monkeypatch):
    """root may write anywhere, so the system's answer is planted."""
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder) != tmp_path)
    for target in (tmp_path / "out", tmp_path / "new" / "out"):
        with pytest.raises(QexportError) as error:
            check_output(target)
        assert f"{target}: cannot be written, {tmp_path} is no folder" in one_line(error)


def test_refuses_what_it_would_destroy(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not empty and holds no bundle"), write_bundle(tmp_path / "notes"):
        pass
    with pytest.raises(UsageError, match="a file is there already"), write_bundle(tmp_path / "notes" / "thesis.txt"):
        pass
    write_small(tmp_path / "out")
    (tmp_path / "out" / "report.html").write_text("mine")
    before = digest(tmp_path)
    with pytest.raises(UsageError, match=r"would delete report\.html"), write_bundle(tmp_path / "out"):
        pass
    assert digest(tmp_path) == before


def edit(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    for key, value in changes.items():
        manifest.pop(key)
        if value is not None:
            manifest[key] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / MANIFEST).unlink(), "not a bundle, it has no manifest.json"),
        (lambda f: (f / MANIFEST).write_text("{"), "cannot be read"),
        (lambda f: (f / MANIFEST).write_text("[1]"), "no schema_version"),
        (lambda f: edit(f, schema_version=99), "schema_version 99 is newer"),
        (lambda f: edit(f, sites=None), "key 'sites' is missing"),
        (lambda f: edit(f, sites="none"), "key 'sites' holds what it cannot be, 'none'; convert again"),
        (lambda f: edit(f, inputs=["ids"]), "key 'inputs' holds what it cannot be, ['ids']"),
        (lambda f: edit(f, files={"../../etc/passwd": {}}), "leaves the folder"),
        (lambda f: (f / "classical.onnx").unlink(), "classical.onnx of the bundle is missing"),
        (lambda f: (f / "test_data_set_0" / "input_0.pb").unlink(), "input_0.pb of the bundle is missing"),
    ],
)
def test_a_damaged_bundle(tmp_path, damage, message):
    write_small(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(QexportError) as error:
        Bundle.open(tmp_path / "out")
    text = one_line(error)
    assert message in text
    assert str(tmp_path / "out") in text


def test_a_changed_file_is_found_on_request(tmp_path):
    make_bundle(tmp_path / "out")
    model = tmp_path / "out" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    assert Bundle.open(tmp_path / "out").changed_files() == ["model.onnx"]
    with pytest.raises(QexportError, match=r"changed since the bundle was written: model\.onnx"):
        Bundle.open(tmp_path / "out", verify=True)


@pytest.mark.parametrize("name", ["missing", "file.onnx"])
def test_not_a_bundle(tmp_path, name):
    (tmp_path / "file.onnx").write_bytes(b"x")
    with pytest.raises(QexportError) as error:
        Bundle.open(tmp_path / name)
    assert "qexport convert" in one_line(error)
