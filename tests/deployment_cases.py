"""Deployments for tests: sealed again after a change, and op libraries of machines that are not here."""

import json
import zipfile
from pathlib import Path

from qexport.bundle import MANIFEST, SEAL, seal_text, sha256
from qexport.deployment.library import LIBRARY

AARCH64, X86_64 = 183, 62


def reseal(folder: Path) -> None:
    """The manifest and its hash as if the files of `folder` had been packed as they are now."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        entry |= {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / SEAL).write_text(seal_text(folder))


def flip(file: Path, at: int) -> None:
    """Change one bit of the byte `at`."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def elf(machine: int, *, kind: int = 3, bits: int = 2) -> bytes:
    """The start of an ELF file, little-endian."""
    return b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9) + kind.to_bytes(2, "little") + machine.to_bytes(2, "little") + b"code"


def make_wheel(path: Path, machine: int, names=(LIBRARY,)) -> Path:
    """A file like a wheel of qexport for a machine."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(f"qexport/lib/{name}", elf(machine))
    return path
