"""The Dockerfiles, as far as they can be checked without Docker: what they copy is what the build takes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def admitted() -> list[str]:
    """What .dockerignore lets into the context: it shuts everything out first."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    return [line[1:] for line in lines if line.startswith("!")]


def test_the_context_holds_what_the_build_takes():
    inside = admitted()
    assert all((ROOT / path).exists() for path in inside)
    text = (ROOT / "CMakeLists.txt").read_text()
    taken = re.findall(r"add_subdirectory\((\S+)\)", text) + re.findall(r"install\(DIRECTORY (\S+?)/? DESTINATION", text)
    for files in re.findall(r"install\(FILES ([^)]*?)\s+DESTINATION", text):
        taken += files.split()
    assert {"cpp", "custom_ops", "examples/cpp"} <= set(taken)
    for path in [*taken, "pyproject.toml", "README.md", "CMakeLists.txt", "cmake", "qexport"]:
        assert any(path == entry or path.startswith(f"{entry}/") for entry in inside), path


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.stem)
def test_images_are_pinned_small_and_without_rights(file):
    text = file.read_text()
    base = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", text, re.M)[1]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base)
    assert re.findall(r"^FROM (.+)$", text, re.M) == ["${PYTHON_IMAGE} AS build", "${PYTHON_IMAGE}"]
    runtime = text[text.rindex("\nFROM ") :]
    assert "apt-get" not in runtime
    assert "pip install" not in runtime
    assert re.search(r"^USER [1-9]\d*$", runtime, re.M)
    assert 'ENTRYPOINT ["qexport"]' in runtime
    assert 'CMD ["qexport", "doctor"]' in runtime  # the health check


def test_there_is_one_for_each_kind_of_machine():
    assert [file.name for file in DOCKERFILES] == ["cpu.Dockerfile", "cuda.Dockerfile"]
