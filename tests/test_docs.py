"""The pages: docs/api.md is the docstrings', which leave no argument out, docs/commands.md what --help says, and the
programs of docs/integration.md run."""

import inspect
import re
import runpy
import tomllib
from importlib import import_module
from pathlib import Path

import forks
import pytest

DOCS = Path(__file__).parent.parent / "docs"
API, COMMANDS = (runpy.run_path(str(DOCS / f"{name}.py")) for name in ("api", "commands"))


def public_functions():
    """(name, function) of what docs/api.md lists: functions, constructors and methods."""
    for _, module_name, names in API["SECTIONS"]:
        module = import_module(module_name)
        for name in names or module.__all__:
            found = getattr(module, name)
            if inspect.isclass(found):
                yield from ((f"{name}.{method}", getattr(found, method)) for method, _ in API["_public_methods"](found))
            if callable(found):
                yield name, found


def test_api_page_is_up_to_date():
    assert (DOCS / "api.md").read_text() == API["markdown_page"](), "run: python docs/api.py > docs/api.md"


def test_commands_page_is_up_to_date():
    page = (DOCS / "commands.md").read_text()
    assert page == COMMANDS["markdown_page"](), "run: python docs/commands.py > docs/commands.md"


@pytest.mark.parametrize(("name", "function"), list(public_functions()), ids=lambda x: x if isinstance(x, str) else "")
def test_docstrings_leave_no_argument_out(name, function):
    text = inspect.getdoc(function)
    assert text, f"{name} has no docstring"
    if "Args:\n" in text:
        described = text.split("Args:\n")[1].split("\n\n")[0]
        names = {
            part.strip() for line in re.findall(r"^    (\w[\w, ]*):", described, flags=re.M) for part in line.split(",")
        }
        assert names >= {p for p in inspect.signature(function).parameters if p != "self"}


def install(project: str, folder: Path):
    """What pip leaves of a project's entry points."""
    project = tomllib.loads(project)["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [line for group, points in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines))


def test_the_programs_of_the_integration_guide(tmp_path):
    """As a reader would: those that begin with the name of a file go there, the others run in their order in one process."""
    blocks = re.findall(r"```(python|toml)\n(.*?)```", (DOCS / "integration.md").read_text(encoding="utf-8"), flags=re.S)
    program = []
    for language, block in blocks:
        if named := re.match(r"# (\S+\.(?:py|toml))\n", block):
            (tmp_path / named[1]).write_text(block)
            if language == "toml":
                install(block, tmp_path)
        else:
            program.append(block)
    assert len(program) >= 8
    forks.printed("\n".join(program), tmp_path, name="guide.py")
