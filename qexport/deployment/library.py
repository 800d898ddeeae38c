"""The op library of the machine that a deployment is for, and the check that it is one."""

import platform
import shutil
import sys
import zipfile
from pathlib import Path

from qexport.errors import QexportError, UsageError
from qexport.installed import LIBRARY_STEM, find_library, plugin_path

# Targets, and the e_machine of their ELF files (elf.h).
MACHINES = {"linux-x86_64": 62, "linux-aarch64": 183}
LIBRARY = f"lib{LIBRARY_STEM}.so"
PLUGIN = plugin_path(LIBRARY).name
_ELF_NAMES = {3: "x86", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv"}
_SHARED_OBJECT = 3


def this_target() -> str | None:
    """The target that this machine is, None where it is none of them."""
    name = f"{sys.platform}-{platform.machine()}"
    return name if name in MACHINES else None


def check_target(target: str | None) -> str:
    """`target`, or this machine's when None.

    Raises:
        UsageError: no target of that name, or none is given and this machine is none.
    """
    chosen = target or this_target()
    if chosen not in MACHINES:
        found = f"target {target!r} is not known" if target else "this machine is no target"
        raise UsageError(f"{found}; targets: {', '.join(MACHINES)}")
    return chosen


def copy_library(folder: Path, target: str, provider: str, given=None, *, allow_fallback=False) -> None:
    """Copy the op library of `target` into `folder`, for CUDA with its plugin.

    Args:
        given: a wheel of qexport, or a libqexport_ops.so with the plugin beside it; None takes the installed package's.
        allow_fallback: whether the library may go alone where there is no plugin.

    Raises:
        UsageError: `given` is None and the installed package is for another machine.
        QexportError: the library or the plugin is missing, or is not for `target`.
    """
    wanted = {LIBRARY: True, PLUGIN: not allow_fallback} if provider == "cuda" else {LIBRARY: True}
    if given is not None and Path(given).suffix == ".whl":
        _unpack(Path(given), folder, wanted)
        origins = [f"{given}: its {name}" for name in wanted]
    else:
        source = Path(given) if given is not None else _installed(target)
        origins = [source, plugin_path(source)]
        for (name, needed), file in zip(wanted.items(), (source, plugin_path(source)), strict=False):
            if file.is_file():
                shutil.copyfile(file, folder / name)
            elif needed:
                raise QexportError(f"{file}: no such file; {_mend(target)}")
    for name, origin in zip(wanted, origins, strict=False):
        if (folder / name).is_file():
            _check_machine(folder / name, origin, target)


def _mend(target: str) -> str:
    return f"give --library a wheel of qexport for {target} or a {LIBRARY}"


def _installed(target: str) -> Path:
    library = find_library()
    if target != this_target() or library is None:
        holds = f"is for {this_target() or sys.platform}" if library else "holds no op library"
        raise UsageError(f"this installation {holds}; {_mend(target)}")
    return library


def _unpack(wheel: Path, folder: Path, wanted: dict[str, bool]) -> None:
    """The files `wanted` of the folder qexport/lib in a wheel, each with whether it must be there."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, needed in wanted.items():
                if needed or f"qexport/lib/{name}" in archive.namelist():
                    with archive.open(f"qexport/lib/{name}") as source, open(folder / name, "wb") as copy:
                        shutil.copyfileobj(source, copy)
    except KeyError:
        raise QexportError(f"{wheel}: holds no qexport/lib/{name}; give a wheel of qexport that does") from None
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise QexportError(f"{wheel}: cannot be read as a wheel ({' '.join(str(error).split())})") from error


def _check_machine(file: Path, origin, target: str) -> None:
    """Check the ELF header of a shared object: 64 bits, little-endian, and of the target's machine. What is wrong with it is
    told of `origin`, where it was copied from."""
    with open(file, "rb") as opened:
        header = opened.read(20)
    if len(header) < 20 or header[:4] != b"\x7fELF":
        raise QexportError(f"{origin} is no ELF file; {_mend(target)}")
    kind, machine = (int.from_bytes(header[at : at + 2], "little") for at in (16, 18))
    if header[4:6] != b"\x02\x01" or kind != _SHARED_OBJECT:
        raise QexportError(f"{origin} is no little-endian shared object of 64 bits; {_mend(target)}")
    if machine != MACHINES[target]:
        found = _ELF_NAMES.get(machine, f"ELF machine {machine}")
        raise QexportError(f"{origin} is built for {found}, which does not fit the target {target}; {_mend(target)}")
