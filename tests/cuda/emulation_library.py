"""The CUDA sources as a shared library for the CPU (emulation.h): each compiled again only when it, or a header that it
includes, has changed."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
INCLUDES = (ROOT / "cpp" / "include", ROOT / "cpp" / "cuda", ROOT / "tests" / "cuda")
ALIGNMENT = ("-fsanitize=alignment", "-fno-sanitize-recover=alignment")  # x86 reads 16 bytes anywhere, a GPU does not
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *("-DQEXPORT_CUDA_EMULATION", *ALIGNMENT),
)
# Accesses that nothing orders end the process (emulation_races.h): the compiler calls a function for each, but not for those
# of what orders threads.
RACES = os.environ.get("QEXPORT_EMULATED_RACES") == "1"
WATCHED = ("-fsanitize=thread", "--param=tsan-distinguish-volatile=1", "-fno-threadsafe-statics")
RUNTIME = [ROOT / "tests" / "cuda" / name for name in ("emulation.cc", "emulation_mma.cc")]
DETECTOR = ROOT / "tests" / "cuda" / "emulation_races.cc"


def cuda_headers() -> Path | None:
    """The folder of a toolkit's headers, of the system or of the extra `cuda-build`."""
    nvcc = shutil.which("nvcc")
    spec = find_spec("nvidia")
    folders = [
        *(Path(root) / "include" for root in (os.environ.get("CUDA_PATH"), "/usr/local/cuda") if root),
        *([Path(nvcc).resolve().parents[1] / "include"] if nvcc else []),
        *(found for root in (spec.submodule_search_locations if spec else ()) for found in Path(root).glob("*/include")),
    ]
    return next((folder for folder in folders if (folder / "cuda_bf16.h").is_file()), None)


def _text(source: Path, seen: set) -> str:
    """Of a source and of all headers of this project that it includes."""
    if source in seen:
        return ""
    seen.add(source)
    text = source.read_text()
    for name in re.findall(r'^\s*#include "(.+)"', text, flags=re.M):
        found = next((folder / name for folder in (source.parent, *INCLUDES) if (folder / name).is_file()), None)
        text += _text(found, seen) if found else ""
    return text


def _compile(source: Path, races: bool, headers: Path, compiler: str, cache: Path) -> Path:
    watched = () if source in (*RUNTIME, DETECTOR) else WATCHED
    flags = *FLAGS, *(("-DQEXPORT_EMULATED_RACES", "-g1", *watched) if races else ())
    if source in RUNTIME:
        flags += ("-O3",)  # kernels take longer to compile than to run, but this is what all their threads do most
    includes = *(f"-I{folder}" for folder in INCLUDES), "-isystem", str(headers)
    command = [compiler, *flags, *includes, "-x", "c++", "-c"]
    key = hashlib.sha256("\n".join([*command, _text(source, set())]).encode()).hexdigest()[:16]
    result = cache / f"{source.stem}-{key}.o"
    if not result.is_file():
        part = result.with_suffix(".part")
        done = subprocess.run([*command, str(source), "-o", str(part)], capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name} does not compile for the emulation:\n{done.stderr}"
        part.replace(result)
    return result


def build(cache: Path, program: Path | None = None, races: bool = RACES, kernels: bool = True) -> Path:
    """The library, or a C++ program, linked with the same kernels or none, in the folder `cache`. Needs `cuda_headers`, and
    a C++ compiler."""
    headers, compiler = cuda_headers(), os.environ.get("CXX", "g++")
    cuda = ROOT / "cpp" / "cuda"
    sources = [*sorted(cuda.glob("*.cu")), cuda / "table.cc"] if kernels else []
    sources += [*RUNTIME, *([DETECTOR] if races else []), *([program] if program else [])]
    with open(cache / "lock", "w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the tests that run at the same time one compiles, the others find it done
        objects = list(pool.map(lambda source: _compile(source, races, headers, compiler, cache), sources))
        key = hashlib.sha256("\n".join(map(str, objects)).encode()).hexdigest()[:16]
        result = cache / (f"{program.stem}-{key}" if program else f"libqexport_cuda_emulation-{key}.so")
        if not result.is_file():
            part = result.with_suffix(".part")
            kind = [] if program else ["-shared"]
            subprocess.run([compiler, *ALIGNMENT, *kind, *map(str, objects), "-o", str(part)], check=True)
            part.replace(result)
    return result
