"""The pages: docs/api.md is the docstrings', which leave no argument out, and the programs of docs/integration.md run."""

import inspect
import re
import runpy
from importlib import import_module
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
API = runpy.run_path(str(DOCS / "api.py"))


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
