"""What a long run has found so far, kept beside its output: the same command takes it up again where it was stopped."""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np

from qexport.errors import QexportError


class Checkpoint:
    """Arrays by name, each in a file of its own that is whole or absent.

    As a context it adds to an error that ends it where the findings lie, and removes them when it ends well.

    Args:
        folder: made when something is first stored.
        key: what the findings depend on, as JSON data; those of another key are thrown away.
        lasting: whether they stay when all is done.
    """

    def __init__(self, folder: Path, key: dict, *, lasting: bool = False):
        self.folder, self.lasting = Path(folder), lasting
        self._key = json.dumps(key, sort_keys=True)
        self.resumed = self._is_ours()
        if self.folder.is_dir() and not self.resumed:
            self.remove()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            if not self.lasting:
                self.remove()
        elif self.folder.is_dir():
            error.add_note(
                f"what was found so far is kept in {self.folder}: the next run on the same model, data and methods goes on "
                "from there"
            )

    def _is_ours(self) -> bool:
        try:
            return (self.folder / "key.json").read_text(encoding="utf-8") == self._key
        except OSError:
            return False

    def has(self, name: str) -> bool:
        """Whether something is stored under that name."""
        return self._path(name).is_file()

    def load(self, name: str) -> np.ndarray:
        """What is stored under a name; the file is mapped, not read.

        Raises:
            QexportError: it is there no longer.
        """
        try:
            return np.load(self._path(name), mmap_mode="r")
        except FileNotFoundError:
            raise QexportError(
                f"{self.folder}: a finding was removed as it was needed; let one run at a time write an output"
            ) from None

    def save(self, name: str, array) -> None:
        """Store an array.

        Raises:
            QexportError: the folder cannot be written.
        """
        path = self._path(name)
        half = path.with_suffix(f".{os.getpid()}.half")  # runs may share a folder of findings
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "key.json").write_text(self._key, encoding="utf-8")
            with half.open("wb") as file:
                np.save(file, np.asarray(array))
            half.replace(path)
        except OSError as error:
            reason = error.strerror or error
            raise QexportError(
                f"{self.folder}: cannot store a finding ({reason}); free some space, or name another folder for findings"
            ) from error
        finally:
            with suppress(OSError):  # it has its name, or could not be written
                half.unlink()

    def compute(self, name: str, function) -> np.ndarray:
        """What is stored under a name, or else what `function()` gives, stored."""
        if not self.has(name):
            self.save(name, function())
        return self.load(name)

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        # With the key: two runs that share a folder by mistake must not read each other's.
        return self.folder / f"{digest([self._key, name])}.npy"


def digest(data) -> str:
    """A short name for JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:24]


def array_digest(array: np.ndarray) -> str:
    """A short name for an array, its type and its shape."""
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:24]
