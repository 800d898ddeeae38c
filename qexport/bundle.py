"""The bundle: one folder with the converted model, its baseline, a manifest and samples. `bundle_writer` writes it."""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType

from qexport.arguments import as_path
from qexport.errors import QexportError

SCHEMA_VERSION = 1
MODEL = "model.onnx"
CLASSICAL = "classical.onnx"
MANIFEST = "manifest.json"
SAMPLES = "test_data_set_0"
SEAL = "manifest.json.sha256"


@dataclass(frozen=True)
class Kind:
    """What a folder with a manifest is.

    Attributes:
        name: how it is called; manifest["kind"].
        command: the one that writes it.
        again: the mend of a damaged one.
        keys: those that its manifest must have, and what they hold; lists are of objects.
        sealed: whether a file beside the manifest holds its sha256, in the form that `sha256sum -c` reads.
    """

    name: str
    command: str
    again: str
    keys: dict[str, type | tuple[type, ...]]
    sealed: bool = False


BUNDLE = Kind(
    "bundle",
    "qexport convert MODEL -o DIR",
    "convert again",
    {
        "files": dict,
        "sites": list,
        "left_alone": list,
        "inputs": list,
        "limits": dict,
        "opset": int,
        "seed_input": (str, NoneType),
    },
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
        path = as_path("bundle", path)
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
    def model_sha256(self) -> str | None:
        """Of the sha256 of the converted model and of its weights beside it, as they were written; by it a report knows what
        was measured. None where they are not listed, as in a bundle that is being written."""
        files = self.manifest.get("files", {})
        parts = [file["sha256"] for name, file in files.items() if name == MODEL or name.endswith(".data")]
        return hashlib.sha256(" ".join(sorted(parts)).encode()).hexdigest() if parts else None

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
    for key, types in kind.keys.items():
        if key not in manifest:
            raise QexportError(f"{file}: key {key!r} is missing; {kind.again}")
        value = manifest[key]
        entries = value if isinstance(value, list) else []
        if not isinstance(value, types) or not all(isinstance(entry, dict) for entry in entries):
            raise QexportError(f"{file}: key {key!r} holds what it cannot be, {value!r:.60}; {kind.again}")
    for name in manifest["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise QexportError(f"{file}: file name {name!r} leaves the folder of the {kind.name}; do not trust it")
    return manifest


def sha256(path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_files(kind: Kind) -> set[str]:
    """The files of a folder that its manifest does not list."""
    return {MANIFEST, SEAL} if kind.sealed else {MANIFEST}


def seal_text(path) -> str:
    """What the file SEAL of a folder must hold: the sha256 and name of its manifest."""
    return f"{sha256(Path(path) / MANIFEST)}  {MANIFEST}\n"
