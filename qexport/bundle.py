"""The bundle: one folder with the converted model, its baseline, a manifest and samples. Reading it, and writing it safely.

A bundle is written into a hidden folder beside its place and renamed when it is complete, so that a failure, a full
disk or Ctrl-C leaves neither half a bundle nor a damaged old one.
"""

import errno
import glob
import hashlib
import json
import os
import platform
import shutil
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qexport._swap import deferred_signals, exchange, terminate_as_exception
from qexport.errors import QexportError, UsageError

SCHEMA_VERSION = 1
MODEL = "model.onnx"
CLASSICAL = "classical.onnx"
MANIFEST = "manifest.json"
SAMPLES = "test_data_set_0"
SEAL = "manifest.json.sha256"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Kind:
    """What a folder with a manifest is.

    Attributes:
        name: how it is called; manifest["kind"].
        command: the one that writes it.
        again: the mend of a damaged one.
        keys: those that its manifest must have.
        sealed: whether a file beside the manifest holds its sha256, in the form that `sha256sum -c` reads.
    """

    name: str
    command: str
    again: str
    keys: tuple[str, ...]
    sealed: bool = False


BUNDLE = Kind(
    "bundle",
    "qexport convert MODEL -o DIR",
    "convert again",
    ("files", "sites", "left_alone", "inputs", "limits", "opset", "seed_input"),
)


@dataclass(frozen=True)
class Bundle:
    """A finished bundle on disk: `path` is its folder, `manifest` the parsed manifest.json."""

    path: Path
    manifest: dict = field(repr=False)

    @classmethod
    def open(cls, path, *, verify: bool = False) -> "Bundle":
        """Open the bundle in the folder `path`.

        Args:
            verify: also compare the size and sha256 of every file with the manifest.

        Raises:
            QexportError: not a bundle, made by a newer qexport, or files are missing (or changed, with `verify`).
        """
        path = Path(path)
        if path.is_file():
            raise QexportError(f"{path}: a file, not a bundle; give the folder that 'qexport convert' wrote")
        if not path.is_dir():
            raise QexportError(f"{path}: no such bundle; make one with 'qexport convert MODEL -o {path}'")
        bundle = cls(path, read_manifest(path))
        missing = [name for name in bundle.file_names if not (path / name).is_file()]
        if missing:
            raise QexportError(f"{path}: {missing[0]} of the bundle is missing; copy the whole folder or convert again")
        if verify and (changed := bundle.changed_files()):
            raise QexportError(
                f"{path}: changed since the bundle was written: {', '.join(changed)}; copy it or convert again"
            )
        return bundle

    @property
    def model_path(self) -> Path:
        """The converted model."""
        return self.path / MODEL

    @property
    def classical_path(self) -> Path:
        """The classical model, the baseline."""
        return self.path / CLASSICAL

    @property
    def samples_path(self) -> Path:
        """The folder of stored inputs and the classical model's outputs for them."""
        return self.path / SAMPLES

    @property
    def tokenizer_path(self) -> Path:
        """tokenizer.json of a text model; may not exist."""
        return self.path / "tokenizer" / "tokenizer.json"

    @property
    def file_names(self) -> list[str]:
        """What it consists of beside the manifest: the files that it was written with, and a tokenizer that came later."""
        added = [self.tokenizer_path.relative_to(self.path).as_posix()] if self.tokenizer_path.is_file() else []
        return list(dict.fromkeys((MODEL, CLASSICAL, *self.manifest["files"], *added)))

    @property
    def seed_input(self) -> str | None:
        """Name of the graph input of the converted model that takes the seed; None where nothing draws."""
        return self.manifest["seed_input"]

    def changed_files(self) -> list[str]:
        """The files whose size or sha256 differs from the manifest's, in the manifest's order."""
        return [name for name, entry in self.manifest["files"].items() if is_changed(self.path / name, entry)]


def is_changed(file, entry: dict) -> bool:
    """Whether the size or sha256 of a file differs from its entry in a manifest."""
    return os.stat(file).st_size != entry["bytes"] or sha256(file) != entry["sha256"]


def read_manifest(path, kind: Kind = BUNDLE) -> dict:
    """The manifest of the bundle (or what else `kind` says) in the folder `path`, checked for its version and keys.

    Raises:
        QexportError: no manifest, not JSON, of another kind or schema version, a key is missing or a file name leaves the
            folder.
    """
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise QexportError(f"{path}: not a {kind.name}, it has no {MANIFEST}; make one with '{kind.command}'")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise QexportError(f"{file}: cannot be read ({error}); {kind.again}") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise QexportError(f"{file}: not a manifest of qexport, it has no schema_version")
    if version > SCHEMA_VERSION:
        raise QexportError(
            f"{file}: schema_version {version} is newer than this qexport reads ({SCHEMA_VERSION}): pip install -U qexport"
        )
    found = manifest.get("kind", BUNDLE.name)  # bundles of earlier releases do not say what they are
    if found != kind.name:
        raise QexportError(f"{path}: a {found}, not a {kind.name}; make one with '{kind.command}'")
    for key in kind.keys:
        if key not in manifest:
            raise QexportError(f"{file}: key {key!r} is missing; {kind.again}")
    for name in manifest["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise QexportError(f"{file}: file name {name!r} leaves the folder of the {kind.name}; do not trust it")
    return manifest


def sha256(path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    target = Path(os.path.realpath(output))
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


def check_output(target, kind: Kind = BUNDLE) -> None:
    """Check that a bundle may be written to `target`: nothing there, an empty folder, or one of its kind to replace.

    Raises:
        UsageError: a file is there, or a folder holding files that are not of its kind.
    """
    target = Path(target)
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


def own_files(kind: Kind) -> set[str]:
    """The files of a folder that its manifest does not list."""
    return {MANIFEST, SEAL} if kind.sealed else {MANIFEST}


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


def seal_text(path) -> str:
    """What the file SEAL of a folder must hold: the sha256 and name of its manifest."""
    return f"{sha256(Path(path) / MANIFEST)}  {MANIFEST}\n"


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
