"""Writing a bundle safely: all of it or nothing.

A bundle is written into a hidden folder beside its place and renamed when it is complete, so that a failure, a full
disk or Ctrl-C leaves neither half a bundle nor a damaged old one.
"""

import errno
import glob
import json
import os
import platform
import shutil
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qexport._swap import check_writable, deferred_signals, exchange, terminate_as_exception
from qexport.arguments import as_path
from qexport.bundle import BUNDLE, MANIFEST, SCHEMA_VERSION, SEAL, Kind, own_files, read_manifest, seal_text, sha256
from qexport.errors import QexportError, UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class BundleWriter:
    """What `write_bundle` yields: put files below `path`, set `manifest`; `target` is where the bundle will be."""

    path: Path
    target: Path
    kind: Kind
    manifest: dict = field(default_factory=dict)


@contextmanager
def write_bundle(output, kind: Kind = BUNDLE):
    """Write a bundle (or what else `kind` says) to the folder `output`, all or nothing.

    Yields a `BundleWriter`. On a normal exit the files are hashed into manifest["files"], manifest.json is written and
    the folder is renamed to `output`; an existing bundle there is exchanged in one step and then removed. On any failure,
    Ctrl-C and SIGTERM included, the new files are removed and an existing bundle is as it was.

    Raises:
        UsageError: `output` is a file, or a folder with files that no bundle wrote.
        QexportError: the folder cannot be written, or the disk is full.
    """
    target = Path(os.path.realpath(as_path("output", output)))
    check_output(target, kind)
    made = _make_parents(target.parent)
    _remove_abandoned(target)
    partial = target.parent / f"{_partial_prefix(target)}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial"
    writer = BundleWriter(partial, target, kind)
    done = False
    try:
        with terminate_as_exception():
            try:
                writer.path.mkdir()
                yield writer
                _write_manifest(writer)
                check_output(target, kind)
                with deferred_signals():
                    exchange(writer.path, target)
                    done = True
            finally:
                with deferred_signals():
                    shutil.rmtree(writer.path, ignore_errors=True)
                    if not done:
                        _remove_empty(made)
    except OSError as error:
        raise QexportError(_explain(error, target)) from error


def check_output(target, kind: Kind = BUNDLE, source=None) -> None:
    """Check that a bundle may be written to `target`: nothing there, an empty folder, or one of its kind to replace.

    Args:
        source: the bundle that it is made from, which stays.

    Raises:
        UsageError: a file is there, a folder holding files that are not of its kind, or `source`.
        QexportError: the folder that it would lie in takes no files.
    """
    target = as_path("output", target)
    if source is not None and os.path.realpath(target) == os.path.realpath(source):
        raise UsageError(f"{target}: the new {kind.name} is made from what is there; choose another folder")
    check_writable(target)
    if not os.path.exists(target):  # of a name that is too long as well, which Path.exists raises
        return
    if not target.is_dir():
        raise UsageError(f"{target}: a file is there already; choose another folder for the {kind.name}")
    present = {str(p.relative_to(target)) for p in target.rglob("*") if not p.is_dir()}
    if not present:
        return
    try:
        manifest = read_manifest(target, kind)
    except QexportError:
        raise UsageError(f"{target}: the folder is not empty and holds no {kind.name}; choose another folder") from None
    if strangers := sorted(present - set(manifest["files"]) - own_files(kind)):
        raise UsageError(
            f"{target}: replacing this {kind.name} would delete {strangers[0]}; move it or choose another folder"
        )


def _partial_prefix(target: Path) -> str:
    """How the names of this machine's half-written folders for `target` begin."""
    return f".{target.name}.{platform.node().partition('.')[0]}"


def _remove_abandoned(target: Path) -> None:
    """Remove what processes of this machine that no longer live (killed, out of memory) left half-written for `target`."""
    for folder in target.parent.glob(f"{glob.escape(_partial_prefix(target))}.*.partial"):
        pid = folder.name.split(".")[-3]
        if pid.isdigit() and not _lives(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _lives(pid: int) -> bool:
    if os.name != "posix":  # on Windows os.kill(pid, 0) would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _write_manifest(writer: BundleWriter) -> None:
    files = sorted(p for p in writer.path.rglob("*") if p.is_file())
    names = {p.relative_to(writer.path).as_posix(): p for p in files}
    writer.manifest["files"] = {
        name: {"sha256": sha256(p), "bytes": p.stat().st_size} for name, p in names.items() if name != MANIFEST
    }
    manifest = {"schema_version": SCHEMA_VERSION, "kind": writer.kind.name, **writer.manifest}
    (writer.path / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if writer.kind.sealed:
        (writer.path / SEAL).write_text(seal_text(writer.path), encoding="ascii")


def _make_parents(folder: Path) -> list[Path]:
    """Create `folder` and its parents; the ones that were created, innermost first."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise QexportError(_explain(error, folder)) from error
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # not made, or someone else put something into it
            return


def _explain(error: OSError, target: Path) -> str:
    # numpy's tofile and a few others report a short write with no errno, in words only
    if error.errno in _FULL or "free space" in str(error) or "requested and" in str(error):
        return f"{target}: the disk is full or over its limit; free some space or choose another folder"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{error.filename or target}: no permission ({error.strerror}); choose another folder or its owner"
    return f"{target}: cannot write the bundle: {' '.join(str(error).split())}"
